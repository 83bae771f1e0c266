"""Every attack, in the dry run and in training, against a server that runs uploads in the sandbox."""

from __future__ import annotations

import inspect
import time

import pytest

from tests.hostile.attacks import files, network, processes, replies, resources
from tests.hostile.world import CALL_SECONDS, DRY_RUN_SECONDS, OBTAINED, Attack, World
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
"""The attacks that run by default; the others are marked as slow."""

HARMLESS = {
    "becomes_root",
    "makes_rare_system_calls",
    "changes_its_inputs",
    "starts_a_thread_that_does_not_end",
    "leaves_its_namespaces",
    "lists_the_disk",
    "searches_for_objects_of_others",
    "searches_for_other_descriptors",
    "creates_a_temporary_file",
    "mounts",
    "opens_a_device",
    "prints",
    "reads_environments_in_proc",
    "reads_the_environment",
    "reads_the_memory_of_other_processes",
    "reads_the_servers_database",
    "runs_a_shell",
    "sends_several_results",
    "patches_torch",
    "traces_its_parent",
}
"""The attacks that may end without an error, because they find nothing or only their own data."""

HANGS = {"loops", "ignores_signals_and_exceptions", "multiplies_forever", "sleeps"}

RETURNS_ITS_OWN = {"reads_the_environment"}
"""The attacks that may return a text, because it is their own. The test checks that it contains no secret."""

PARAMETERS = [
    pytest.param(attack, id=attack.__name__, marks=() if attack.__name__ in QUICK else pytest.mark.slow)
    for attack in ATTACKS
]


@pytest.mark.parametrize("phase", ["upload", "training"])
@pytest.mark.parametrize("attack", PARAMETERS)
def test_an_attack_does_no_harm(sandboxed: World, attack: Attack, phase: str) -> None:
    name, since, start = attack.__name__, len(sandboxed.results), time.monotonic()
    reply, error = "", None
    try:
        loss = sandboxed.upload(attack, phase)
        reply = repr(sandboxed.train(loss)) if phase == "training" else ""
    except TinkerbellError as raised:
        reply, error = str(raised), raised
    seconds = time.monotonic() - start
    harm = sandboxed.harm(reply)
    if name in RETURNS_ITS_OWN:
        harm = [each for each in harm if not each.startswith(OBTAINED)]
    sandboxed.restore()
    assert harm == []
    assert sandboxed.changes_for_the_neighbour(since) == []
    assert isinstance(error, BadLoss) or (error is None and name in HARMLESS), reply
    assert len(reply) < 60_000
    assert "\x1b" not in reply
    assert seconds < DRY_RUN_SECONDS + CALL_SECONDS + 30
    if name in HANGS:
        assert "timed out" in reply
    if name == "sends_requests_forever":  # a fast machine sends 10,000 requests before the time is up
        assert "timed out" in reply or "more than 10000 requests" in reply


def test_every_list_names_existing_attacks() -> None:
    assert len(ATTACKS) >= 40
    assert len({attack.__name__ for attack in ATTACKS}) == len(ATTACKS)
    assert {attack.__name__ for attack in ATTACKS} >= QUICK | HARMLESS | HANGS | RETURNS_ITS_OWN
