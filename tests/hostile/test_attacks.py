"""Every attack, when the loss is tried and when it trains, against a server that runs uploads in the sandbox."""

from __future__ import annotations

import inspect
import time

import pytest

from tests.hostile.attacks import files, network, processes, replies, resources
from tests.hostile.world import CALL, TRIAL, Attack, World
from tinkerbell_core.errors import BadLoss, TinkerbellError

ATTACKS: list[Attack] = [
    attack
    for module in (files, network, processes, replies, resources)
    for name, attack in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and attack.__module__ == module.__name__
]

QUICK = {
    "writes_a_file",
    "reads_a_secret",
    "reads_environments_in_proc",
    "connects_by_tcp",
    "runs_a_program",
    "kills_its_parent",
    "returns_a_gradient_of_nan",
    "rewrites_the_checks",
    "writes_a_pickle",
    "announces_a_tensor_of_many_bytes",
    "exits_at_once",
    "sleeps",
}
"""Run by default; the others are slow together."""

HARMLESS = {
    "becomes_root",
    "calls_rare_things",
    "changes_its_inputs",
    "leaves_a_thread_behind",
    "leaves_its_namespaces",
    "lists_the_disk",
    "looks_for_objects_of_others",
    "looks_for_other_descriptors",
    "makes_a_temporary_file",
    "mounts",
    "opens_a_device",
    "prints",
    "reads_environments_in_proc",
    "reads_the_environment",
    "reads_the_memory_of_others",
    "reads_the_servers_database",
    "runs_a_shell",
    "says_two_things",
    "spoils_torch_for_others",
    "traces_its_parent",
}
"""May end as a loss that did no harm: what they found was nothing, or was their own."""

HANGS = {"asks_without_end", "loops", "loops_whatever_is_raised", "multiplies_for_ever", "sleeps"}

OWN = {"reads_the_environment"}
"""Return what is their own: that it holds no secret is looked at, not that there is something."""

PARAMETERS = [
    pytest.param(attack, id=attack.__name__, marks=() if attack.__name__ in QUICK else pytest.mark.slow)
    for attack in ATTACKS
]


@pytest.mark.parametrize("when", ["upload", "training"])
@pytest.mark.parametrize("attack", PARAMETERS)
def test_an_attack_reaches_nothing(sandboxed: World, attack: Attack, when: str) -> None:
    name, since, start = attack.__name__, len(sandboxed.results), time.monotonic()
    told, error = "", None
    try:
        loss = sandboxed.upload(attack, when)
        told = repr(sandboxed.train(loss)) if when == "training" else ""
    except TinkerbellError as raised:
        told, error = str(raised), raised
    seconds = time.monotonic() - start
    harm = sandboxed.harm(told)
    if name in OWN:
        harm = [each for each in harm if not each.startswith("GOT SOMETHING")]
    sandboxed.restore()
    assert harm == []
    assert sandboxed.neighbour_saw(since) == []
    assert isinstance(error, BadLoss) or (error is None and name in HARMLESS), told
    assert len(told) < 60_000
    assert "\x1b" not in told
    assert seconds < TRIAL + CALL + 30
    if name in HANGS:
        assert "timed out" in told


def test_there_are_many_of_them() -> None:
    assert len(ATTACKS) >= 40
    assert len({attack.__name__ for attack in ATTACKS}) == len(ATTACKS)
    assert {attack.__name__ for attack in ATTACKS} >= QUICK | HARMLESS | HANGS | OWN
