"""The same attacks succeed against a server that trusts uploads, so the tests of the sandbox can fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.attacks import files, network, processes, resources
from tests.hostile.world import Attack, World, world
from tinkerbell_core.errors import TinkerbellError

# without the attacks that would use up the memory or the processes of this machine, or never end
SUCCEED: list[Attack] = [
    files.writes_a_file,
    files.appends_to_a_file,
    files.truncates_a_file,
    files.deletes_a_file,
    files.renames_a_file,
    files.changes_a_mode,
    files.creates_a_folder,
    files.creates_a_link,
    files.saves_a_tensor,
    files.reads_a_secret,
    files.reads_the_environment,
    files.reads_environments_in_proc,
    network.connects_by_tcp,
    network.sends_by_udp,
    network.sends_a_request_to_the_server,
    network.listens,
    network.creates_a_unix_socket,
    processes.forks,
    processes.runs_a_program,
    processes.runs_a_shell,
]

KILL: list[Attack] = [resources.exits_at_once, resources.crashes, resources.aborts]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("trusted"), "trusted") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["upload", "training"])
@pytest.mark.parametrize("attack", SUCCEED, ids=lambda attack: attack.__name__)
def test_an_attack_succeeds_if_uploads_are_trusted(trusted: World, attack: Attack, phase: str) -> None:
    assert harm_of(trusted, attack, phase) != []


@pytest.mark.slow
@pytest.mark.parametrize("attack", KILL, ids=lambda attack: attack.__name__)
def test_an_attack_ends_the_engine_if_uploads_are_trusted(trusted: World, attack: Attack) -> None:
    before = trusted.client.healthz()["restarts"]
    harm_of(trusted, attack, "training")
    assert trusted.client.healthz()["restarts"] > before


def harm_of(world: World, attack: Attack, phase: str) -> list[str]:
    reply = ""
    try:
        loss = world.upload(attack, phase)
        if phase == "training":
            reply = repr(world.train(loss))
    except TinkerbellError as error:
        reply = str(error)
    try:
        return world.harm(reply)
    finally:
        world.restore()
