"""Runs every benchmark in this folder and prints their results in one table; `--json` prints a JSON list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import _common


def main(arguments: list[str]) -> int:
    options = [argument for argument in arguments if argument != "--json"]
    results, failed = [], []
    for script in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        print(f"{script.name} …", file=sys.stderr, flush=True)
        finished = subprocess.run([sys.executable, str(script), "--json", *options], stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            failed.append(script.name)
        else:
            results.append(json.loads(finished.stdout.splitlines()[-1]))
    if "--json" in arguments:
        print(json.dumps(results))
    else:
        _common.print_table([{"benchmark": result["benchmark"]} | row for result in results for row in result["rows"]])
        for result in results:
            details = ", ".join(f"{name}: {value}" for name, value in result["details"].items())
            print(f"\n{result['benchmark']}: {details}")
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
