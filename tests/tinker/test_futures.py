"""One poll returns all samples of a session; clones of a session have separate results; samples can be cancelled."""

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

from tests.tinker.raw_client import RawClient
from tests.tinker.sdk import now, since, text


def sample(sampler: Any, seed: int, max_tokens: int = 6) -> Any:
    prompt = types.ModelInput.from_ints(text(3 + seed % 7, seed))
    params = types.SamplingParams(max_tokens=max_tokens, seed=seed, temperature=1.0, stop=[])
    return sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)


def tokens(futures: list[Any]) -> list[list[int]]:
    return [list(future.result().sequences[0].tokens) for future in futures]


@since("0.30", "retrieve_futures")
def test_one_poll_returns_the_results_of_all_samples_of_a_session(server: str, model_folder: Path) -> None:
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


def poll(raw_client: RawClient, sampler: str, cursor: int = 0, clone: int = 0, timeout: float = 0) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return dict(raw_client.post("retrieve_futures", target=target, prev_cursor=cursor, timeout=timeout).json())


def test_a_poll_returns_each_finished_sample_of_its_clone_once(raw_client: RawClient) -> None:
    sampler = raw_client.sampler(1)
    assert poll(raw_client, sampler) == {"completions": [], "cursor": 0}
    sent = [raw_client.sample(sampler, seq) for seq in (0, 1, 10**9)]
    for future in sent:
        raw_client.result(future)
    first = poll(raw_client, sampler)
    ids = [future.json()["request_id"] for future in sent]
    assert [one["request_id"] for one in first["completions"]] == ids[:2]
    assert all(one["state"] == "finished" for one in first["completions"])
    assert all(one["response_payload_uncompressed_size"] > 0 for one in first["completions"])
    assert poll(raw_client, sampler, first["cursor"]) == {"completions": [], "cursor": first["cursor"]}
    assert [one["request_id"] for one in poll(raw_client, sampler, clone=1)["completions"]] == ids[2:]


def test_a_poll_waits_for_the_next_sample_or_its_timeout(raw_client: RawClient) -> None:
    sampler = raw_client.sampler(2)
    began = time.monotonic()
    assert poll(raw_client, sampler, timeout=0.5)["completions"] == []
    assert time.monotonic() - began >= 0.5
    future = raw_client.sample(sampler, 0, max_tokens=60)
    (one,) = poll(raw_client, sampler, timeout=30)["completions"]
    assert one["request_id"] == future.json()["request_id"]
    assert raw_client.post("retrieve_futures", target={"sampling_session_id": "unknown"}).status_code == 404


@since("0.36", "join_sampling_session")
def test_a_pickled_client_is_a_clone_with_another_range_of_seq_ids(server: str, model_folder: Path) -> None:
    sampler = now(tinker.ServiceClient(base_url=server).create_sampling_client(base_model=str(model_folder)))
    clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    expected = tokens([sample(sampler, 1)])
    for clone in clones:
        assert tokens([sample(clone, 1)]) == expected
    assert [clone._request_id_counter for clone in clones] == [10**9 + 1, 2 * 10**9 + 1]


def occupy_engine(raw_client: RawClient) -> httpx.Response:
    """A request that occupies the engine for some time."""
    return raw_client.forward_backward(raw_client.model(), 1, rows=2400)


def test_a_cancelled_sample_is_removed_from_the_queue(raw_client: RawClient) -> None:
    sampler = raw_client.sampler(3)
    working = occupy_engine(raw_client)
    future = raw_client.sample(sampler, 0, max_tokens=110, stop=[])
    cancelled = raw_client.post("cancel_future", request_id=future.json()["request_id"])
    assert cancelled.status_code == 204
    result = raw_client.done(future)
    assert (result["category"], "cancelled" in result["error"]) == ("user", True)
    assert [one["state"] for one in poll(raw_client, sampler)["completions"]] == ["failed"]
    raw_client.output(working)
    # a finished request does not change
    assert raw_client.post("cancel_future", request_id=working.json()["request_id"]).status_code == 204
    raw_client.output(working)
    assert raw_client.post("cancel_future", request_id="unknown").status_code == 404
    raw_client.result(raw_client.sample(sampler, 1))


@since("0.36", "a future of a sample that can be cancelled")
def test_cancelling_a_future_of_the_sdk_cancels_the_request(
    server: str, model_folder: Path, raw_client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = now(tinker.ServiceClient(base_url=server).create_sampling_client(base_model=str(model_folder)))
    tokens([sample(sampler, 1)])
    accepted, cancelled = threading.Event(), list[str]()
    cancel, request_sample = sampler.holder._send_cancel_request, sampler._send_asample_request

    async def send_cancel(request_id: str) -> None:
        await cancel(request_id)
        cancelled.append(request_id)

    async def send_sample(*args: Any) -> Any:
        future = await request_sample(*args)
        accepted.set()
        return future

    monkeypatch.setattr(sampler.holder, "_send_cancel_request", send_cancel)
    monkeypatch.setattr(sampler, "_send_asample_request", send_sample)
    working = occupy_engine(raw_client)
    future = sample(sampler, 2, max_tokens=110)
    assert accepted.wait(20)
    time.sleep(0.1)
    (future.future() if hasattr(future, "future") else future).cancel()
    deadline = time.monotonic() + 20
    while not cancelled and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(cancelled) == 1
    raw_client.output(working)
    assert tokens([sample(sampler, 1)])


def test_the_requests_of_a_session_that_ends_are_cancelled(server: str, model_folder: Path) -> None:
    ending, other = RawClient(server, model_folder), RawClient(server, model_folder)
    waiting = [ending.sample(ending.sampler(1), seq, max_tokens=120, stop=[]) for seq in range(40)]
    start = time.monotonic()
    ended = ending.http.post(f"/sessions/{ending.session}/finish", json={"reason": {"type": "success"}})
    assert ended.status_code == 204
    results = [ending.result(future) for future in waiting]
    seconds = time.monotonic() - start
    assert b"cancelled" in results[-1].content
    other.result(other.sample(other.sampler(1), 0))
    for client in (ending, other):
        client.http.close()
    assert seconds < 20


def test_an_inflight_sampler_keeps_two_folders_at_most(server: str, server_folder: Path, model_folder: Path) -> None:
    client = RawClient(server, model_folder)
    model = client.model()
    samplers = []
    for number in range(6):
        saved = client.post(
            "save_weights_for_sampler",
            model_id=model,
            seq_id=number + 1,
            sampling_session_seq_id=number,
            kind="inflight",
        )
        samplers.append(client.done(saved)["sampling_session_id"])
    folders = sorted(folder.name for folder in server_folder.glob(f"**/{model}/for-sampler.*"))
    assert folders == ["for-sampler.4", "for-sampler.5"]
    # the first sampler draws from the newest weights
    assert client.result(client.sample(samplers[0], 1)).status_code == 200
    client.http.close()
