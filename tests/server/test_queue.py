"""The fair queue: the order of jobs, the rotation of tenants, and jobs in sandboxes while another job computes."""

from __future__ import annotations

import asyncio
from typing import Any

from tinkerbell_server.commands import RunLoss
from tinkerbell_server.service.queue import SANDBOXED_OF_TENANT, FairQueue, Job


def job(id: str, model: str, loss: str = "tinkerbell-core:cross_entropy", tenant: str = "local") -> Job:
    command = RunLoss(model_id=model, loss=loss, data=[], hyperparameters={}, backward=True)
    return make_job(id, model, "forward_backward", command, tenant)


def make_job(id: str, model: str | None, kind: str, command: Any, tenant: str = "local") -> Job:
    nothing: Any = lambda *_: None  # noqa: E731
    return Job(
        id=id,
        kind=kind,
        lane=model or "sampler:",
        model_id=model,
        tenant=tenant,
        command=command,
        on_start=nothing,
        on_end=nothing,
    )


async def ready(queue: FairQueue) -> list[str]:
    """The ids of all jobs that may run now, in their order."""
    found = []
    try:
        while True:
            found.append((await asyncio.wait_for(queue.next(), 0.02)).id)
    except TimeoutError:
        return found


def test_one_job_computes_while_jobs_in_sandboxes_run() -> None:
    async def run() -> None:
        queue = FairQueue(sandboxed=True)
        for each in (job("a", "a", "upload:x"), job("b", "b"), job("c", "c"), job("d", "d", "upload:x")):
            queue.put(each)
        assert await ready(queue) == ["a", "b", "d"]
        queue.remove_running(next(each for each in queue.running if each.id == "b"))
        assert await ready(queue) == ["c"]

    asyncio.run(run())


def test_jobs_of_one_model_never_overtake_each_other() -> None:
    async def run() -> None:
        queue = FairQueue(sandboxed=True)
        for each in (job("a", "m", "upload:x"), job("b", "m"), job("c", "m", "upload:x"), job("d", "n")):
            queue.put(each)
        assert await ready(queue) == ["a", "d"]
        for finished, then in (("d", []), ("a", ["b"]), ("b", ["c"])):
            queue.remove_running(next(each for each in queue.running if each.id == finished))
            assert await ready(queue) == then

    asyncio.run(run())


def test_the_number_of_sandboxes_of_one_tenant_is_limited() -> None:
    async def run() -> None:
        queue = FairQueue(sandboxed=True)
        for number in range(SANDBOXED_OF_TENANT + 2):
            queue.put(job(f"a{number}", f"a{number}", "upload:x", "a"))
        queue.put(job("b", "b", "upload:x", "b"))
        assert len(await ready(queue)) == SANDBOXED_OF_TENANT + 1
        assert "b" in [each.id for each in queue.running]

    asyncio.run(run())


def test_trusted_uploads_run_one_after_the_other() -> None:
    async def run() -> None:
        queue = FairQueue()
        for each in (job("a", "a", "upload:x"), job("b", "b")):
            queue.put(each)
        assert await ready(queue) == ["a"]

    asyncio.run(run())


def test_a_job_that_is_being_tokenised_delays_only_its_own_lane() -> None:
    async def run() -> None:
        queue = FairQueue()
        waiting = job("a", "m")
        waiting.ready = False
        for each in (waiting, job("b", "m"), job("c", "n")):
            queue.put(each)
        assert await ready(queue) == ["c"]
        queue.complete(waiting, waiting.command)
        queue.remove_running(queue.running[0])
        assert await ready(queue) == ["a"]
        queue.remove_running(queue.running[0])
        assert await ready(queue) == ["b"]

    asyncio.run(run())


def test_tenants_alternate_regardless_of_their_number_of_models() -> None:
    async def run() -> None:
        queue = FairQueue()
        for each in (
            *(job(f"a{i}", f"a{i}", tenant="a") for i in range(3)),
            *(job(f"b{i}", "b", tenant="b") for i in range(2)),
        ):
            queue.put(each)
        predicted = {id: queue.position(id) for id in ("a0", "b0", "a1", "b1", "a2")}
        order = []
        while len(queue):
            order += await ready(queue)
            queue.remove_running(queue.running[0])
        assert order == ["a0", "b0", "a1", "b1", "a2"]
        assert predicted == {id: place for place, id in enumerate(order)}

    asyncio.run(run())


def test_removing_a_job_keeps_the_order_of_the_others() -> None:
    async def run() -> None:
        queue = FairQueue()
        for each in (job("a", "a", tenant="a"), job("b", "b", tenant="b"), job("c", "c", tenant="a")):
            queue.put(each)
        assert queue.remove_waiting("a")
        assert not queue.remove_waiting("a")
        assert queue.position("c") == 0
        assert await ready(queue) == ["c"]
        queue.remove_running(queue.running[0])
        assert await ready(queue) == ["b"]

    asyncio.run(run())


def test_samples_of_the_base_model_from_several_tenants_run_together() -> None:
    async def run() -> None:
        queue = FairQueue()
        for each in (
            make_job("a", None, "sample", None, "a"),
            make_job("b", None, "sample", None, "b"),
            job("c", "c", tenant="b"),
        ):
            queue.put(each)
        assert await ready(queue) == ["a"]
        assert [each.id for each in queue.samples_behind(queue.running[0], 8)] == ["b"]
        queue.remove_running(queue.running[0])
        queue.remove_running(queue.running[0])
        assert await ready(queue) == ["c"]

    asyncio.run(run())
