"""The digest of a loss changes if and only if the computation of the loss changes."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinkerbell_core.decorator import loss
from tinkerbell_core.digest import digest_of, source_of

PLAIN = """
def mine(model_outputs, loss_fn_inputs, attention_mask, *, scale=1.0):
    return model_outputs.sum() * scale * BETA
"""


def cell(source: str, filename: str = "<cell 1>", name: str = "mine", **scope: Any) -> Callable[..., Any]:
    """The function that a notebook cell defines, with its source in linecache as in IPython."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module: dict[str, Any] = {"__name__": "__main__", **scope}
    exec(compile(source, filename, "exec"), module)
    return module[name]


def digest(fn: Callable[..., Any]) -> str:
    return digest_of(fn, coupling="batch", group_size=1)


def test_the_name_and_line_of_a_cell_do_not_change_the_digest() -> None:
    again = cell("\n\n\n" + PLAIN, "<cell 7>", BETA=0.1)
    assert digest(cell(PLAIN, BETA=0.1)) == digest(again)


def test_another_value_of_a_captured_global_gives_another_digest() -> None:
    assert digest(cell(PLAIN, BETA=0.1)) != digest(cell(PLAIN, BETA=0.2))


def test_another_value_of_a_closure_variable_gives_another_digest() -> None:
    def make(beta: float) -> Callable[..., Any]:
        return lambda model_outputs, loss_fn_inputs, attention_mask: model_outputs.sum() * beta

    assert digest(make(0.1)) == digest(make(0.1))
    assert digest(make(0.1)) != digest(make(0.2))


def test_another_default_gives_another_digest() -> None:
    source = PLAIN.replace("scale=1.0", "scale=S")
    assert digest(cell(source, BETA=1, S=1.0)) != digest(cell(source, BETA=1, S=2.0))


def test_another_helper_gives_another_digest() -> None:
    first, second = (cell(f"def helper(x):\n    return x * {n}\n", f"<helper {n}>", "helper") for n in (1, 2))
    source = PLAIN.replace("* BETA", "+ helper(1)")
    assert digest(cell(source, helper=first)) == digest(cell(source, helper=first))
    assert digest(cell(source, helper=first)) != digest(cell(source, helper=second))


def test_the_digest_includes_what_a_helper_captures() -> None:
    helpers = [cell("def helper(x):\n    return x * C\n", "<helper>", "helper", C=c) for c in (1, 2)]
    source = PLAIN.replace("* BETA", "+ helper(1)")
    assert digest(cell(source, helper=helpers[0])) != digest(cell(source, helper=helpers[1]))


def test_the_digest_includes_the_numbers_of_a_captured_tensor() -> None:
    one, same, other = (digest(cell(PLAIN, BETA=torch.full((3,), x, dtype=torch.bfloat16))) for x in (1, 1, 2))
    assert one == same != other


def test_the_digest_includes_the_weights_of_a_captured_module() -> None:
    layer = torch.nn.Linear(2, 2)
    before = digest(cell(PLAIN, BETA=layer))
    with torch.no_grad():
        layer.weight += 1
    assert digest(cell(PLAIN, BETA=layer)) != before


def test_an_address_in_a_repr_does_not_change_the_digest() -> None:
    class Setting:
        def __init__(self, beta: float) -> None:
            self.beta = beta

    one, same, other = (digest(cell(PLAIN, BETA=Setting(beta))) for beta in (0.1, 0.1, 0.2))
    assert one == same != other


def test_the_digest_includes_installed_functions_and_modules_by_name_only() -> None:
    source = PLAIN.replace("BETA", "F.relu(relu(scale))")
    functional, relu = torch.nn.functional, torch.nn.functional.relu
    assert digest(cell(source, F=functional, relu=relu)) == digest(cell(source, F=functional, relu=relu))
    assert digest(cell(source, F=functional, relu=relu)) != digest(cell(source, F=torch, relu=relu))


def test_the_digest_includes_coupling_and_group_size() -> None:
    fn = cell(PLAIN, BETA=1)
    digests = {digest_of(fn, coupling=c, group_size=g) for c in ("batch", "sequence") for g in (1, 2)}
    assert len(digests) == 4


def test_a_captured_loss_has_the_digest_of_its_function() -> None:
    inner = cell(PLAIN, BETA=1)
    source = PLAIN.replace("* BETA", "+ BETA(0)")
    assert digest(cell(source, BETA=inner)) == digest(cell(source, BETA=loss(inner)))


def test_a_recursive_loss_keeps_its_digest_when_its_cell_runs_again() -> None:
    source = PLAIN.replace("* BETA", "* len(mine.__name__)")
    first = cell(source, mine=None)
    second = cell(source, "<cell 2>", mine=loss(first))
    assert digest(first) == digest(second)


def test_without_source_the_digest_includes_the_bytecode() -> None:
    def unsourced(constant: int) -> Callable[..., Any]:
        scope: dict[str, Any] = {}
        exec(f"def mine(a, b, c): return a + {constant}", scope)
        return scope["mine"]

    assert source_of(unsourced(1)) == ""
    assert digest(unsourced(1)) == digest(unsourced(1))
    assert digest(unsourced(1)) != digest(unsourced(2))


def test_the_source_has_no_decorators() -> None:
    source = "@identity(\n    1\n)\n" + PLAIN.strip()
    fn = cell(source, "<decorated>", BETA=1, identity=lambda _: lambda fn: fn)
    assert source_of(fn) == PLAIN.strip() + "\n"
    assert source_of(loss(fn)) == PLAIN.strip() + "\n"


def test_a_decorator_does_not_change_the_digest() -> None:
    decorated = cell("@identity\n" + PLAIN.strip(), "<one>", BETA=1, identity=lambda fn: fn)
    assert digest(decorated) == digest(cell(PLAIN, BETA=1))


@pytest.mark.parametrize(
    "value", [None, 1, "a", b"a", 1.5, [1, (2,)], {"a": {1}}, int, types.SimpleNamespace(a=1), sys]
)
def test_any_captured_value_has_a_digest(value: object) -> None:
    assert digest(cell(PLAIN, BETA=value)) == digest(cell(PLAIN, BETA=value))
