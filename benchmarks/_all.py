"""Every benchmark beside this file, one after the other, in one table; `--json` prints a list for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import _common


def main(arguments: list[str]) -> int:
    given = [argument for argument in arguments if argument != "--json"]
    results, failed = [], []
    for script in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        print(f"{script.name} …", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(script), "--json", *given], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(script.name)
        else:
            results.append(json.loads(done.stdout.splitlines()[-1]))
    if "--json" in arguments:
        print(json.dumps(results))
    else:
        _common.print_table([{"benchmark": one["benchmark"]} | line for one in results for line in one["rows"]])
        for one in results:
            details = ", ".join(f"{name}: {value}" for name, value in one["details"].items())
            print(f"\n{one['benchmark']}: {details}")
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
