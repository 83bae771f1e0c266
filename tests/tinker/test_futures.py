"""Samples awaited by one poll for a whole session, clones of a session, and samples that nobody wants any more."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.tinker.hand import Wire
from tests.tinker.sdk import now, since, text


def sample(sampler: Any, seed: int) -> Any:
    prompt = types.ModelInput.from_ints(text(3 + seed % 7, seed))
    return sampler.sample(
        prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=6, seed=seed, temperature=1.0)
    )


def tokens(futures: list[Any]) -> list[list[int]]:
    return [list(future.result().sequences[0].tokens) for future in futures]


@since("0.30", "retrieve_futures")
def test_one_poll_serves_every_sample_of_a_session(server: str, model_folder: Path) -> None:
    service = tinker.ServiceClient(base_url=server)
    sampler = now(service.create_sampling_client(base_model=str(model_folder)))
    expected = tokens([sample(sampler, seed) for seed in range(16)])
    holder = sampler.holder
    holder._client_config = holder._client_config.model_copy(update={"sample_use_retrieve_futures": True})
    polled = now(service.create_sampling_client(base_model=str(model_folder)))
    for _ in range(2):
        assert tokens([sample(polled, seed) for seed in range(16)]) == expected
    assert polled._futures_poller is not None
    assert tokens([sample(polled, 3)]) == expected[3:4]


def ask(wires: Wire, sampler: str, cursor: int = 0, clone: int = 0, timeout: float = 0) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return dict(wires.post("retrieve_futures", target=target, prev_cursor=cursor, timeout=timeout).json())


def test_a_poll_tells_once_what_has_ended_of_its_clone(wires: Wire) -> None:
    sampler = wires.sampler(1)
    assert ask(wires, sampler) == {"completions": [], "cursor": 0}
    sent = [wires.sample(sampler, seq) for seq in (0, 1, 10**9)]
    for future in sent:
        wires.result(future)
    first = ask(wires, sampler)
    ids = [future.json()["request_id"] for future in sent]
    assert [one["request_id"] for one in first["completions"]] == ids[:2]
    assert all(one["state"] == "finished" for one in first["completions"])
    assert all(one["response_payload_uncompressed_size"] > 0 for one in first["completions"])
    assert ask(wires, sampler, first["cursor"]) == {"completions": [], "cursor": first["cursor"]}
    assert [one["request_id"] for one in ask(wires, sampler, clone=1)["completions"]] == ids[2:]


def test_a_poll_waits_for_what_will_end(wires: Wire) -> None:
    sampler = wires.sampler(2)
    began = time.monotonic()
    assert ask(wires, sampler, timeout=0.5)["completions"] == []
    assert time.monotonic() - began >= 0.5
    future = wires.sample(sampler, 0, max_tokens=60)
    (one,) = ask(wires, sampler, timeout=30)["completions"]
    assert one["request_id"] == future.json()["request_id"]
    assert wires.post("retrieve_futures", target={"sampling_session_id": "nobody"}).status_code == 404


@since("0.36", "join_sampling_session")
def test_a_client_that_was_pickled_is_a_clone_with_numbers_of_its_own(server: str, model_folder: Path) -> None:
    sampler = now(tinker.ServiceClient(base_url=server).create_sampling_client(base_model=str(model_folder)))
    clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    expected = tokens([sample(sampler, 1)])
    for clone in clones:
        assert tokens([sample(clone, 1)]) == expected
    assert [clone._request_id_counter for clone in clones] == [10**9 + 1, 2 * 10**9 + 1]


def busy(wires: Wire) -> httpx.Response:
    """Something that takes the engine a while."""
    return wires.forward_backward(wires.model(), 1, rows=2400)


def test_a_sample_that_nobody_wants_is_taken_out_of_the_queue(wires: Wire) -> None:
    sampler = wires.sampler(3)
    working = busy(wires)
    future = wires.sample(sampler, 0)
    cancelled = wires.post("cancel_future", request_id=future.json()["request_id"])
    assert cancelled.status_code == 204
    told = wires.done(future)
    assert (told["category"], "cancelled" in told["error"]) == ("user", True)
    assert [one["state"] for one in ask(wires, sampler)["completions"]] == ["failed"]
    wires.output(working)
    # one that has ended stays as it was
    assert wires.post("cancel_future", request_id=working.json()["request_id"]).status_code == 204
    wires.output(working)
    assert wires.post("cancel_future", request_id="nobody").status_code == 404
    wires.result(wires.sample(sampler, 1))


@since("0.36", "a future of a sample that can be cancelled")
def test_the_sdk_cancels_what_it_dropped(
    server: str, model_folder: Path, wires: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = now(tinker.ServiceClient(base_url=server).create_sampling_client(base_model=str(model_folder)))
    tokens([sample(sampler, 1)])
    taken, dropped = threading.Event(), list[str]()
    cancel, ask = sampler.holder._send_cancel_request, sampler._send_asample_request

    async def sent(request_id: str) -> None:
        await cancel(request_id)
        dropped.append(request_id)

    async def asked(*args: Any) -> Any:
        future = await ask(*args)
        taken.set()
        return future

    monkeypatch.setattr(sampler.holder, "_send_cancel_request", sent)
    monkeypatch.setattr(sampler, "_send_asample_request", asked)
    working = busy(wires)
    future = sample(sampler, 2)
    assert taken.wait(20)
    time.sleep(0.1)
    (future.future() if hasattr(future, "future") else future).cancel()
    deadline = time.monotonic() + 20
    while not dropped and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(dropped) == 1
    wires.output(working)
    assert tokens([sample(sampler, 1)])
