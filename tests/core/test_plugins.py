"""Plugins are discovered and loaded separately, and a broken plugin is described."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tinkerbell_core import hookspecs
from tinkerbell_core.errors import AmbiguousLoss
from tinkerbell_core.plugins import load_plugins
from tinkerbell_core.registry import build_registry

ROOT = Path(__file__).parents[2]

GOOD = """
from tinkerbell_core import LossFnOutput, hookimpl, loss

@loss(name="{name}")
def fn(model_outputs, loss_fn_inputs, attention_mask):
    "A loss of {name}."
    return LossFnOutput(model_outputs.sum())

@hookimpl
def register_losses():
    return [fn]
"""

Install = Callable[..., list[EntryPoint]]


def test_a_plugin_registers_its_losses_with_their_provenance(install: Install) -> None:
    (info,) = load_plugins(install("acme-losses", GOOD.format(name="acme")))
    (spec,) = info.losses
    assert (info.id, info.version, info.error) == ("acme-losses:main", "1.2", None)
    assert spec.id == "acme-losses:acme"
    assert spec.provenance.kind == "entry_point"
    assert info.describe().losses == ("acme-losses:acme",)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("raise SystemExit(2)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        (GOOD.format(name="x").replace("[fn]", "1 / 0"), "ZeroDivisionError"),
        (GOOD.format(name="x").replace("[fn]", "None"), "TypeError"),
        (GOOD.format(name="x").replace("[fn]", "[fn.fn]"), "is not a loss: decorate it with @loss"),
        (GOOD.format(name="x").replace("    return [fn]", "    yield fn\n    raise OSError('late')"), "late"),
        (GOOD.format(name="x").replace("register_losses():", "register_losses(registry):"), "PluginValidationError"),
        (GOOD.format(name="x").replace("def register_losses", "def register_loses"), "register_loses"),
    ],
    ids=["import", "exit", "syntax", "hook raises", "no list", "no spec", "generator", "argument", "unknown hook"],
)
def test_a_broken_plugin_is_listed_with_its_reason_and_does_not_stop_the_others(
    install: Install, source: str, reason: str
) -> None:
    found = (
        install("b-broken", source)
        + install("a-good", GOOD.format(name="a"))
        + install("c-good", GOOD.format(name="c"))
    )
    registry, infos = build_registry(found)
    assert [info.id for info in infos] == ["a-good:main", "b-broken:main", "c-good:main"]
    assert reason in str(infos[1].error)
    assert infos[1].losses == ()
    assert [spec.name for spec in registry] == ["a", "c"]


def test_an_entry_point_may_be_disabled_by_id_or_distribution(install: Install) -> None:
    found = install("one", GOOD.format(name="one")) + install("two", GOOD.format(name="two"))
    assert [info.id for info in load_plugins(found, disabled={"one:main"})] == ["two:main"]
    assert [info.id for info in load_plugins(found, disabled=["two"])] == ["one:main"]


def test_the_built_in_losses_are_loaded_if_plugins_are_disabled(install: Install) -> None:
    found = install("one", GOOD.format(name="one")) + install("tinkerbell-core", GOOD.format(name="cross_entropy"))
    assert [info.id for info in load_plugins(found, enabled=False)] == ["tinkerbell-core:main"]


def test_a_disabled_plugin_is_never_imported(install: Install, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    found = install("loud", f"open({str(marker)!r}, 'w').close()")
    load_plugins(found, disabled={"loud"})
    assert not marker.exists()


def test_two_losses_of_one_name_are_both_kept_and_need_an_id(install: Install) -> None:
    registry, _ = build_registry(install("one", GOOD.format(name="dpo")) + install("two", GOOD.format(name="dpo")))
    with pytest.raises(AmbiguousLoss, match="use the id one:dpo or two:dpo"):
        registry.get("dpo")
    assert registry.get("two:dpo").provenance.distribution == "two"


def test_a_distribution_that_provides_a_loss_twice_is_reported(install: Install) -> None:
    found = install("one", GOOD.format(name="dpo").replace("[fn]", "[fn, fn]"))
    registry, (info,) = build_registry(found)
    assert info.error == "one:dpo is provided twice: rename one of the two losses"
    assert len(registry) == 1


def test_the_built_in_losses_are_entry_points_of_the_root_project() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["tinkerbell"]
    for name, module in declared.items():
        point = importlib.metadata.EntryPoint(name, module, "tinkerbell")
        (info,) = load_plugins([point])
        assert [spec.name for spec in info.losses] == [name]


def test_every_hook_is_documented() -> None:
    hooks = [value for name, value in vars(hookspecs).items() if hasattr(value, "tinkerbell_spec")]
    assert hooks
    assert all(hook.__doc__ for hook in hooks)
