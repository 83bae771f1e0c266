"""Writes one page for each loss, from its spec, its docstring and its source."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch

from tinkerbell_core.dryrun import discover, plausible_settings
from tinkerbell_core.errors import BadData, BadLoss
from tinkerbell_core.example_inputs import guess
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.logits import plain_logits
from tinkerbell_core.loss_docstring import parse_docstring
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import BUILT_IN
from tinkerbell_core.registry import build_registry
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec

ROOT = Path(__file__).parents[1]

_VOCAB, _HIDDEN, _POSITIONS = 11, 16, 3
_CONVERTED = {"target_tokens", "weights", "ref_logprobs"}
"""Inputs that the server computes from text."""

_WORDS = {
    "target_tokens": "the token that each position predicts; the server computes it from text",
    "weights": "the weight of each position; the server computes it from text",
    "ref_logprobs": "log-probabilities under the reference model; the server computes them if a call has none",
}


def bundled_losses() -> dict[str, list[LossSpec]]:
    """The losses of this repository by distribution, built-in ones first."""
    registry, _ = build_registry()
    plugins = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    found = {name: [spec for spec in registry if spec.provenance.distribution == name] for name in (BUILT_IN, *plugins)}
    missing = [name for name, losses in found.items() if not losses]
    if missing:
        raise RuntimeError(f"the losses of {', '.join(missing)} cannot be loaded: install the plugins of this checkout")
    return found


def loss_page(spec: LossSpec) -> str:
    """The Markdown page of a loss."""
    spec, batch = discover(spec, _VOCAB)
    docstring = parse_docstring(spec.summary, spec.source)
    papers = [f"[arXiv:{n}]({link})" for n, link in zip(docstring.papers, docstring.links, strict=True)]
    distribution = spec.provenance.distribution or ""
    install = "tinkerbell-core[server]" if distribution == BUILT_IN else f"./plugins/{distribution}"
    parts = [
        f"# {spec.name}",
        f"{docstring.name[:1].upper()}{docstring.name[1:]}." if docstring.name else "",
        f"```text\n{docstring.formula}\n```",
        escaped(docstring.notes),
        "\n".join(
            [
                "| property | value |",
                "|---|---|",
                f"| id | `{spec.id}` |",
                f"| paper | {', '.join(papers) or 'none given'} |",
                f"| scope | {_scope(spec)} |",
                f"| logits | {_logits(spec)} |",
                f"| distribution | `{distribution}` {spec.provenance.version} |",
            ]
        ),
        "## Install\n\nIn a checkout of the repository, where the server runs:\n\n"
        f"```console\n$ pip install '{install.replace('tinkerbell-core', '.')}'\n```",
        "## Inputs\n\n" + _inputs(spec, batch),
        "## Hyperparameters\n\n" + _hyperparameters(spec.hyperparameters),
        "## Diagnostics\n\n" + _list([*_run(spec, batch, batch).diagnostics]),
        f"## Example\n\nA call with made-up data:\n\n```python\n{example_call(spec, batch)}\n```",
        f"## Source\n\n```python\n{spec.source.strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def example_call(spec: LossSpec, batch: dict[str, torch.Tensor] | None = None) -> str:
    """A program that calls a loss on a server: with text if the server converts it, else with token ids and inputs."""
    if batch is None:
        spec, batch = discover(spec, _VOCAB)
    required = spec.inputs or ()
    arguments = [f'    loss_fn="{spec.name}",']
    if required and set(required) <= _CONVERTED and spec.group_size == 1:
        data = '["All children grow up."]'
    elif required and set(required) <= _CONVERTED and spec.group_size == 2:
        data = '[{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]'
    else:
        rows = len(next(iter(spec.example_inputs.values()))) if spec.example_inputs else max(2, spec.group_size)
        enough = _runs(spec, batch, required)
        data = json.dumps([list(range(4 + row, 4 + row + _POSITIONS)) for row in range(rows)])
        keys = [key for key in batch if key in required or (not enough and key not in _CONVERTED)]
        if keys:
            entries = [f'        "{key}": {_example(key, batch[key], spec, rows)},' for key in keys]
            arguments += ["    loss_fn_inputs={", *entries, "    },"]
    settings = {h.name: plausible_settings(spec)[h.name] for h in spec.hyperparameters if h.required}
    if settings:
        arguments.append(f"    loss_fn_config={settings!r},".replace("'", '"'))
    imports = ["import numpy as np", ""] if any("np." in line for line in arguments) else []
    return "\n".join(
        [
            *imports,
            "from tinker_client import TinkerClient",
            "",
            'client = TinkerClient("http://localhost:8000")',
            "result = client.hf_backend.forward_backward(",
            '    "my-model",',
            f"    {data},",
            *arguments,
            ")",
            "print(result.loss, result.diagnostics)",
        ]
    )


def _example(key: str, found: torch.Tensor, spec: LossSpec, rows: int) -> str:
    """The expression of one input in an example call."""
    if key.endswith("logits"):
        return f'np.zeros(({rows}, {_POSITIONS}, client.healthz()["vocab_size"]))'
    if key in spec.example_inputs:
        value = found[:, :_POSITIONS] if found.dim() > 1 else found
    else:
        torch.manual_seed(0)
        value = guess(key, torch.ones(rows, _POSITIONS), _VOCAB, per_sequence=found.dim() == 1)
    return json.dumps(
        torch.round(value * 100).div(100).double().numpy().round(2).tolist()
        if value.is_floating_point()
        else value.tolist()
    )


def _inputs(spec: LossSpec, batch: dict[str, torch.Tensor]) -> str:
    rows = ["| input | shape | use | meaning |", "|---|---|---|---|"]
    for key in (*(spec.inputs or ()), *spec.optional_inputs):
        shape = "" if key not in batch else f"`{_shape(key, batch[key])}`"
        need = "required" if key in (spec.inputs or ()) else "optional"
        finite = "finite; " if key in spec.finite else ""
        rows.append(f"| `{key}` | {shape} | {need} | {(finite + _WORDS.get(key, '')).rstrip('; ')} |")
    return "\n".join(rows)


def _shape(key: str, value: torch.Tensor) -> str:
    return "[B, T, V]" if key.endswith("logits") else ("[B]", "[B, T]", "[B, T, K]")[value.dim() - 1]


def _hyperparameters(hyperparameters: tuple[Hyperparameter, ...]) -> str:
    if not hyperparameters:
        return "The loss has no hyperparameters."
    rows = ["| name | type | default | allowed |", "|---|---|---|---|"]
    for hyper in hyperparameters:
        default = "required" if hyper.required else f"`{hyper.default!r}`"
        kind = hyper.type.replace("|", "\\|")
        rows.append(f"| `{hyper.name}` | `{kind}` | {default} | {hyper.allowed or ''} |")
    return "\n".join(rows)


def _runs(spec: LossSpec, batch: dict[str, torch.Tensor], keys: Collection[str]) -> bool:
    """Whether the loss runs with these inputs of the batch only."""
    try:
        _run(spec, batch, keys)
    except (BadData, BadLoss):
        return False
    return True


def _run(spec: LossSpec, batch: dict[str, torch.Tensor], keys: Collection[str]) -> LossFnOutput:
    """The output of the loss on random logits, with these inputs of the batch."""
    shaped = next((value for value in batch.values() if value.dim() > 1), None)
    mask = torch.ones((*next(iter(batch.values())).shape[:1], 8) if shaped is None else shaped.shape[:2])
    hidden = torch.randn(*mask.shape, _HIDDEN).requires_grad_()
    head = torch.nn.Linear(_HIDDEN, _VOCAB, bias=False)
    inputs = {key: value for key, value in batch.items() if key in keys}
    return run_loss(spec, plain_logits(hidden, head), inputs, mask, plausible_settings(spec))


def _list(names: list[str]) -> str:
    return "\n".join(f"- `{name}`" for name in names) or "The loss returns no diagnostics."


def _scope(spec: LossSpec) -> str:
    if spec.coupling == "batch":
        return '`"batch"`: it runs on the whole batch'
    if spec.group_size > 1:
        return f'`"sequence"`, in groups of {spec.group_size} adjacent rows; a group is never split'
    return '`"sequence"`: its rows do not depend on each other'


def _logits(spec: LossSpec) -> str:
    if spec.plain_logits:
        return f"stored: {spec.plain_logits}"
    return f"stored by {', '.join(spec.materialises)}" if spec.materialises else "not stored"


def loss_index(losses: dict[str, list[LossSpec]]) -> str:
    """The Markdown page that lists the pages of all losses."""
    parts = ["# All losses", "One page for each loss. [Which loss](../which-loss.md) helps to choose one."]
    for distribution, specs in losses.items():
        parts.append(f"## {distribution}")
        parts.append("\n".join(f"- [{spec.name}]({spec.name}.md): {_title(spec)}" for spec in specs))
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Plain text as Markdown, which keeps the parts in backticks as code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\[\]<>*_|])", r"\\\1", part) for part in parts)


def _title(spec: LossSpec) -> str:
    docstring = parse_docstring(spec.summary, spec.source)
    return docstring.name or f"`{docstring.formula}`"
