"""`python -m tests.tables` writes the generated tables in docs: the losses, the matches with peers, the settings, the
fields of the OpenAI API."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.oracles.__main__ import mapping, outcome, peer
from tests.oracles.records import read
from tinkerbell_core.loss_docstring import parse_docstring
from tinkerbell_core.registry import LossRegistry, build_registry
from tinkerbell_server.api.openai.fields import fields_table
from tinkerbell_server.cli.settings import settings_table

ROOT = Path(__file__).parents[1]
WHICH, PEERS = ROOT / "docs" / "which-loss.md", ROOT / "docs" / "peers.md"
SETTINGS, OPENAI = ROOT / "docs" / "settings.md", ROOT / "docs" / "openai.md"
BUILT_IN = "tinkerbell-core"
IMPLIED = {"target_tokens", "weights"}
"""Inputs that the server makes from text. The table of losses omits them."""


def bundled(registry: LossRegistry) -> list[str]:
    """The distributions of this repository that have losses, first the one of the built-in losses."""
    ours = {path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml")}
    return [BUILT_IN, *sorted(ours & {spec.provenance.distribution for spec in registry})]


def losses() -> str:
    """One table per package: name and group size, formula, inputs other than IMPLIED, papers."""
    registry, _ = build_registry()
    parts = []
    for distribution in bundled(registry):
        rows = ["| loss | loss of a row or token | more inputs | paper |", "|---|---|---|---|"]
        for spec in registry:
            if spec.provenance.distribution != distribution:
                continue
            docstring = parse_docstring(spec.summary, spec.source)
            reads = [f"`{key}`" for key in spec.inputs or () if key not in IMPLIED]
            reads += [f"`{key}`?" for key in spec.optional_inputs if key not in IMPLIED]
            formula = docstring.formula + (f": {docstring.name}" if docstring.name else "")
            papers = ", ".join(f"[{n}]({link})" for n, link in zip(docstring.papers, docstring.links, strict=True))
            name = f"`{spec.name}`" + (f" (groups of {spec.group_size})" if spec.group_size > 1 else "")
            rows.append(f"| {name} | {formula.replace('|', chr(92) + '|')} | {', '.join(reads)} | {papers} |")
        parts.append(f"### {distribution}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def peers() -> str:
    """The number of matched records and of all bundled records, for each peer."""
    registry, _ = build_registry()
    entries = mapping()
    files = sorted((ROOT / "plugins").glob("*/tests/data/oracles.json.gz"))
    outcomes = [outcome(record, entries, registry) for file in files for record in read(file)]
    total = Counter(map(peer, outcomes))
    matched = Counter(peer(each) for each in outcomes if each.matches)
    rows = [f"| {name} | {matched[name]} | {total[name]} |" for name in sorted(total)]
    rows.append(f"| all | {matched.total()} | {total.total()} |")
    return "\n".join(["| project | matched | records |", "|---|---|---|", *rows])


def with_table(page: str, name: str, table: str) -> str:
    """The page with a new table between the markers of `name`. Raises ValueError if the page has no such markers."""
    begin, end = f"<!-- {name}: written by python -m tests.tables -->", f"<!-- end of {name} -->"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no markers {begin} and {end}")
    return page[: found.start()] + f"{begin}\n{table}\n{end}" + page[found.end() :]


if __name__ == "__main__":
    WHICH.write_text(with_table(WHICH.read_text(), "losses", losses()))
    PEERS.write_text(with_table(PEERS.read_text(), "peers", peers()))
    SETTINGS.write_text(with_table(SETTINGS.read_text(), "settings", settings_table()))
    OPENAI.write_text(with_table(OPENAI.read_text(), "fields", fields_table()))
