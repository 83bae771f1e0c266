"""The same attacks against a server that trusts uploads do succeed: the suite catches what it must."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.attacks import files, network, processes, resources
from tests.hostile.world import Attack, World, world
from tinkerbell_core.errors import TinkerbellError

# not those that would take this machine's memory or processes, or never end
SUCCEED: list[Attack] = [
    files.writes_a_file,
    files.appends_to_a_file,
    files.truncates_a_file,
    files.deletes_a_file,
    files.renames_a_file,
    files.changes_a_mode,
    files.makes_a_folder,
    files.makes_a_link,
    files.saves_a_tensor,
    files.reads_a_secret,
    files.reads_the_environment,
    files.reads_environments_in_proc,
    network.connects_by_tcp,
    network.sends_by_udp,
    network.asks_the_server_itself,
    network.listens,
    network.makes_a_unix_socket,
    processes.forks,
    processes.runs_a_program,
    processes.runs_a_shell,
]

KILL: list[Attack] = [resources.exits_at_once, resources.crashes, resources.aborts]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("trusted"), "trusted") as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("when", ["upload", "training"])
@pytest.mark.parametrize("attack", SUCCEED, ids=lambda attack: attack.__name__)
def test_an_attack_succeeds_where_it_is_trusted(trusted: World, attack: Attack, when: str) -> None:
    assert reached(trusted, attack, when) != []


@pytest.mark.slow
@pytest.mark.parametrize("attack", KILL, ids=lambda attack: attack.__name__)
def test_an_attack_ends_the_engine_where_it_is_trusted(trusted: World, attack: Attack) -> None:
    before = trusted.client.healthz()["restarts"]
    reached(trusted, attack, "training")
    assert trusted.client.healthz()["restarts"] > before


def reached(world: World, attack: Attack, when: str) -> list[str]:
    told = ""
    try:
        loss = world.upload(attack, when)
        if when == "training":
            told = repr(world.train(loss))
    except TinkerbellError as error:
        told = str(error)
    try:
        return world.harm(told)
    finally:
        world.restore()
