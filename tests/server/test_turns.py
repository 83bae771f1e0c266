"""Jobs whose loss was uploaded run beside the one that has the turn, and never in front of their own model's."""

from __future__ import annotations

import asyncio
from typing import Any

from tinkerbell_server.commands import CreateModel, RunLoss
from tinkerbell_server.service.queue import APART_OF_TENANT, FairQueue, Job


def job(id: str, model: str, loss: str = "tinkerbell-core:cross_entropy", tenant: str = "local") -> Job:
    command = RunLoss(model_id=model, loss=loss, data=[], hyperparameters={}, backward=True)
    return made(id, model, "forward_backward", command, tenant)


def made(id: str, model: str | None, kind: str, command: Any, tenant: str = "local") -> Job:
    nothing: Any = lambda *_: None  # noqa: E731
    return Job(
        id=id,
        kind=kind,
        model_id=model,
        tenant=tenant,
        command=lambda: command,
        started=nothing,
        done=nothing,
        failed=nothing,
    )


async def ready(turns: FairQueue) -> list[str]:
    """The ids of all jobs that may run now, in their order."""
    found = []
    try:
        while True:
            found.append((await asyncio.wait_for(turns.next(), 0.02)).id)
    except TimeoutError:
        return found


def test_one_job_has_the_turn_and_sandboxed_ones_run_beside_it() -> None:
    async def run() -> None:
        turns = FairQueue(sandboxed=True)
        for each in (job("a", "a", "upload:x"), job("b", "b"), job("c", "c"), job("d", "d", "upload:x")):
            turns.put(each)
        assert await ready(turns) == ["a", "b", "d"]
        turns.over(next(each for each in turns.running if each.id == "b"))
        assert await ready(turns) == ["c"]

    asyncio.run(run())


def test_jobs_of_one_model_never_overtake_each_other() -> None:
    async def run() -> None:
        turns = FairQueue(sandboxed=True)
        for each in (job("a", "m", "upload:x"), job("b", "m"), job("c", "m", "upload:x"), job("d", "n")):
            turns.put(each)
        assert await ready(turns) == ["a", "d"]
        for finished, then in (("d", []), ("a", ["b"]), ("b", ["c"])):
            turns.over(next(each for each in turns.running if each.id == finished))
            assert await ready(turns) == then

    asyncio.run(run())


def test_a_tenant_has_only_so_many_sandboxes_at_once() -> None:
    async def run() -> None:
        turns = FairQueue(sandboxed=True)
        for number in range(APART_OF_TENANT + 2):
            turns.put(job(f"a{number}", f"a{number}", "upload:x", "a"))
        turns.put(job("b", "b", "upload:x", "b"))
        assert len(await ready(turns)) == APART_OF_TENANT + 1
        assert "b" in [each.id for each in turns.running]

    asyncio.run(run())


def test_trusted_uploads_take_their_turn_like_any_other() -> None:
    async def run() -> None:
        turns = FairQueue()
        for each in (job("a", "a", "upload:x"), job("b", "b")):
            turns.put(each)
        assert await ready(turns) == ["a"]

    asyncio.run(run())


def test_the_command_of_a_job_that_saves_is_not_made_before_its_turn() -> None:
    def never() -> Any:
        raise AssertionError

    async def run() -> None:
        turns = FairQueue(sandboxed=True)
        waiting = made("a", "a", "save", CreateModel)
        object.__setattr__(waiting, "command", never)
        turns.put(waiting)
        assert await ready(turns) == ["a"]

    asyncio.run(run())


def test_a_tenant_with_many_models_gets_no_more_turns_than_one_with_few() -> None:
    async def run() -> None:
        turns = FairQueue()
        for each in (
            *(job(f"a{i}", f"a{i}", tenant="a") for i in range(3)),
            *(job(f"b{i}", "b", tenant="b") for i in range(2)),
        ):
            turns.put(each)
        foreseen = {id: turns.position(id) for id in ("a0", "b0", "a1", "b1", "a2")}
        order = []
        while len(turns):
            order += await ready(turns)
            turns.over(turns.running[0])
        assert order == ["a0", "b0", "a1", "b1", "a2"]
        assert foreseen == {id: place for place, id in enumerate(order)}

    asyncio.run(run())


def test_a_job_taken_out_leaves_the_others_their_turns() -> None:
    async def run() -> None:
        turns = FairQueue()
        for each in (job("a", "a", tenant="a"), job("b", "b", tenant="b"), job("c", "c", tenant="a")):
            turns.put(each)
        assert turns.take_out("a")
        assert not turns.take_out("a")
        assert turns.position("c") == 0
        assert await ready(turns) == ["c"]
        turns.over(turns.running[0])
        assert await ready(turns) == ["b"]

    asyncio.run(run())


def test_samples_of_the_base_model_may_be_of_several_tenants() -> None:
    async def run() -> None:
        turns = FairQueue()
        for each in (
            made("a", None, "sample", None, "a"),
            made("b", None, "sample", None, "b"),
            job("c", "c", tenant="b"),
        ):
            turns.put(each)
        assert await ready(turns) == ["a"]
        assert [each.id for each in turns.beside(turns.running[0], 8)] == ["b"]
        turns.over(turns.running[0])
        turns.over(turns.running[0])
        assert await ready(turns) == ["c"]

    asyncio.run(run())
