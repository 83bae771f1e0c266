"""What heavy or hostile input of one tenant costs the others: the waits for `/healthz` and for a neighbour's call.

Each case runs beside clients that call the server once in a while. `--calls N` also runs N mixed calls, and prints the
memory and the descriptors of the server's processes before and after them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cloudpickle
import httpx
import numpy as np
import psutil
import torch
import zstandard

from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

CLIENTS = 64
BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 30))
ROWS = [[1, 2, 3, 4, 5, 6]]


def busy(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
    """A loss that computes until its time is up, except in the dry run."""
    while attention_mask.shape[1] > 8 and attention_mask.shape[0] == 1:
        pass
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def never_reads(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
    """A loss that asks for all logits, and stops before it reads the answer."""
    import os
    import signal

    if attention_mask.shape[1] > 8:
        threading.Timer(0.0, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
        (model_outputs**3).sum()
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def keeps_asking(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
    """A loss that asks for blocks of logits until it is refused."""
    while attention_mask.shape[1] > 8:
        model_outputs.origin.source.full(torch.arange(min(64, attention_mask.numel())))
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def large_logprobs(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
    """A loss whose result has one log-probability for each token of the vocabulary."""
    logprobs = model_outputs.log_softmax(-1)
    return LossFnOutput(logprobs.sum(), logprobs.detach())


class Attacker:
    """The calls of one tenant, whose errors are part of the case."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.http = httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=120, trust_env=False)
        self.client = TinkerClient(url, api_key=key)

    def upload(self, loss: Callable[..., Any]) -> None:
        custom_loss(self.client, name=loss.__name__, via="cloudpickle")(loss)

    def try_call(self, method: str, *arguments: Any, **options: Any) -> str:
        try:
            getattr(self.client.hf_backend, method)(*arguments, **options)
        except TinkerbellError as error:
            return f"{error.kind}: {str(error)[:90]}"
        return "answered"


def d1(a: Attacker, engine: psutil.Process) -> str:
    session = a.http.post("/api/v1/create_session", json={"tags": [], "sdk_version": "x"}).json()["session_id"]
    body = {
        "model_id": f"{session}:train:0",
        "seq_id": 1,
        "forward_backward_input": {
            "loss_fn": "cross_entropy",
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
                    "loss_fn_inputs": {
                        "weights": {
                            "data": [1.0], "dtype": "float32", "shape": [10**9, 1],
                            "sparse_crow_indices": [0, 1], "sparse_col_indices": [0],
                        }
                    },
                }
            ],
        },
    }  # fmt: skip
    return str(a.http.post("/api/v1/forward_backward", json=body).status_code)


def d2(a: Attacker, engine: psutil.Process) -> str:
    rows = [list(range(200)) + [1] * 55] + [[1, 2]] * 20_000
    return a.try_call("forward", "d2", data=rows, loss_fn_config={"aggregation": "token-mean"})


def d3(a: Attacker, engine: psutil.Process) -> str:
    headers = {"content-encoding": "zstd", "content-type": "application/json"}
    return str(a.http.post("/api/v1/forward_backward", content=BOMB, headers=headers).status_code)


def d4(a: Attacker, engine: psutil.Process) -> str:
    rows = np.random.default_rng(0).integers(0, 250, (60, 230_000)).tolist()
    body = json.dumps({"model_id": "d4", "data": rows})
    answer = a.http.post("/forward", content=body, headers={"content-type": "application/json"})
    return f"{len(body) >> 20} MiB: {answer.status_code}"


def d5(a: Attacker, engine: psutil.Process) -> str:
    large = a.http.post("/api/v1/create_session", json={"user_metadata": {"x": "y" * (10 << 20)}}).status_code
    codes = [a.http.post("/api/v1/create_session", json={"tags": []}).status_code for _ in range(1100)]
    return f"10 MB of metadata: {large}; session 1100: {codes[-1]}"


def d6(a: Attacker, engine: psutil.Process) -> str:
    url = urlsplit(a.url)
    with contextlib.ExitStack() as stack:
        for _ in range(1005):
            stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=10))
        time.sleep(3)
        return f"a client with a key: {a.http.get('/list_models').status_code}"


def _in_threads(count: int, call: Callable[[int], str]) -> str:
    results: list[str] = []
    threads = [threading.Thread(target=lambda n=n: results.append(call(n))) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[-1]


def d7(a: Attacker, engine: psutil.Process) -> str:
    a.upload(busy)
    return _in_threads(8, lambda n: a.try_call("forward", f"d7-{n}", data=[list(range(40))], loss_fn="busy"))


def d8(a: Attacker, engine: psutil.Process) -> str:
    a.upload(never_reads)
    return a.try_call("forward_backward", "d8", data=[list(range(250))] * 8, loss_fn="never_reads")


def d9(a: Attacker, engine: psutil.Process) -> str:
    url = urlsplit(a.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as sock:
        sock.sendall(
            b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        received = b"".join(iter(lambda: sock.recv(4096), b""))
    return f"{received.count(b'HTTP/1.1')} answer: {received[9:12].decode()}"


def d10(a: Attacker, engine: psutil.Process) -> str:
    for process in engine.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "zygote" in " ".join(process.cmdline()) or "bwrap" in process.name():
                process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    a.upload(large_logprobs)
    result = a.try_call("forward", "d10", data=ROWS, loss_fn="large_logprobs")
    return f"{result} after {time.monotonic() - start:.1f} s"


def d11(a: Attacker, engine: psutil.Process) -> str:
    training = a.client.hf_backend.submit("forward_backward", model_id="d11", data=[list(range(250))] * 480)
    sampling = a.http.post("/sample", json={"prompt": [65], "max_tokens": 250, "num_samples": 32, "seed": 0})
    training.result()
    return f"120,000 tokens; sample {sampling.status_code}"


def d12(a: Attacker, engine: psutil.Process) -> str:
    a.upload(keeps_asking)
    before = engine.num_fds()
    result = [a.try_call("forward", "d12", data=[list(range(250))] * 4, loss_fn="keeps_asking") for _ in range(5)][-1]
    return f"{result}; descriptors {before} → {engine.num_fds()}"


def d13(a: Attacker, engine: psutil.Process) -> str:
    before = engine.memory_info().rss >> 20
    results = [a.try_call("create_model", f"d13-{n}", rank=16_384) for n in range(6)]
    return f"{results[-1]}; engine {before} → {engine.memory_info().rss >> 20} MiB"


def d14(a: Attacker, engine: psutil.Process) -> str:
    a.upload(large_logprobs)
    last = ""
    for _ in range(60):
        body = {"model_id": "d14", "data": [list(range(200))] * 8, "loss_fn": "large_logprobs"}
        answer = a.http.post("/forward", json=body)
        last = str(answer.status_code)
        if answer.status_code == 429:
            break
    return f"the last of 60 submitted: {last}"


CASES = {name: case for name, case in globals().items() if name[0] == "d" and name[1:].isdigit()}


async def watch(url: str, keys: dict[str, str], done: asyncio.Event) -> dict[str, list[float]]:
    """Seconds of each call of the observers until the case is done. A status of 5xx is an error."""
    seconds: dict[str, list[float]] = {"healthz": [], "neighbour": []}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as http:

        async def healthz() -> None:
            while not done.is_set():
                start = time.perf_counter()
                (await http.get("/healthz", headers={"x-api-key": keys["ann"]})).raise_for_status()
                seconds["healthz"].append(time.perf_counter() - start)
                await asyncio.sleep(0.02)

        async def call(path: str, key: str, **body: Any) -> float:
            start = time.perf_counter()
            answer = await http.post(path, json=body, headers={"x-api-key": key})
            answer.raise_for_status()
            request_id = answer.json()["request_id"]
            state = (await http.get(f"/futures/{request_id}?wait=30", headers={"x-api-key": key})).json()["state"]
            assert state == "done", state
            return time.perf_counter() - start

        async def neighbour() -> None:
            while not done.is_set():
                seconds["neighbour"].append(await call("/forward_backward", keys["ann"], model_id="m", data=ROWS))
                await asyncio.sleep(0.05)

        async def client(number: int) -> None:
            await asyncio.sleep(number / CLIENTS)
            while not done.is_set():
                await call("/forward", keys["many"], model_id=f"m{number % 8}", data=ROWS)
                await asyncio.sleep(4)

        await asyncio.gather(healthz(), neighbour(), *(client(number) for number in range(CLIENTS)))
    return seconds


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):7.1f} {1e3 * last:7.1f}"


async def run_case(url: str, keys: dict[str, str], case: Callable[[], str]) -> tuple[str, dict[str, list[float]]]:
    done = asyncio.Event()
    watching = asyncio.create_task(watch(url, keys, done))
    await asyncio.sleep(0.5)
    try:
        result = await asyncio.to_thread(case)
        await asyncio.sleep(0.5)
    finally:
        done.set()
    return result, await watching


def mixed_calls(attacker: Attacker, count: int, processes: dict[str, psutil.Process]) -> None:
    """Print memory and descriptors of the processes before and after calls of every kind."""

    def state() -> str:
        return ", ".join(
            f"{name} {process.memory_info().rss >> 20} MiB and {process.num_fds()} descriptors"
            for name, process in processes.items()
        )

    attacker.upload(large_logprobs)
    client = attacker.client.hf_backend
    kinds: list[Callable[[], object]] = [
        lambda: client.forward_backward("mixed", data=ROWS),
        lambda: client.optim_step("mixed", learning_rate=1e-4),
        lambda: client.forward("mixed", data=ROWS * 3, loss_fn="large_logprobs"),
        lambda: client.sample([1, 2, 3], "mixed", max_tokens=2),
        lambda: client.forward_backward("mixed", data=ROWS),
        lambda: client.optim_step("mixed", learning_rate=1e-4),
        lambda: attacker.try_call("forward", "mixed", data=[[999_999]]),
        lambda: attacker.http.get("/list_models"),
    ]
    for number in range(200):
        kinds[number % len(kinds)]()
    print(f"after 200 mixed calls:    {state()}")
    for number in range(count):
        kinds[number % len(kinds)]()
    print(f"after {count:,} more of them: {state()}")


@contextlib.contextmanager
def attacked_server(folder: Path) -> Iterator[tuple[str, dict[str, str], psutil.Process]]:
    with contextlib.closing(Keys(folder / "data")) as store:
        keys = {tenant: store.create(tenant, tenant=tenant)[1] for tenant in ("ann", "many", "eve", "mallory")}
    settings = Settings(data_dir=str(folder / "data"), sandbox_seconds=5.0, result_limit=64, rate_limit=0)
    with running_server(settings, log=folder / "log") as server:
        yield server.url, keys, psutil.Process(server.process.pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="names of cases, for example d4")
    parser.add_argument("--calls", type=int, default=0, help="mixed calls after the cases")
    options = parser.parse_args()
    cloudpickle.register_pickle_by_value(__import__(__name__))
    with tempfile.TemporaryDirectory() as folder, attacked_server(Path(folder)) as (url, keys, api):
        engine = next(child for child in api.children() if "engines.process" in " ".join(child.cmdline()))
        attacker = Attacker(url, keys["eve"])
        warm = asyncio.run(run_case(url, keys, lambda: (time.sleep(5), "")[1]))[1]
        print(f"{'':8} /healthz p50, p99 ms   forward_backward of a neighbour p50, p99 ms")
        print(f"{'none':8} {percentiles(warm['healthz'])}        {percentiles(warm['neighbour'])}")
        for name in options.cases:
            result, seconds = asyncio.run(run_case(url, keys, lambda name=name: CASES[name](attacker, engine)))
            print(
                f"{name:8} {percentiles(seconds['healthz'])}        {percentiles(seconds['neighbour'])}   {result}",
                flush=True,
            )
        if options.calls:
            mixed_calls(Attacker(url, keys["mallory"]), options.calls, {"API": api, "engine": engine})


if __name__ == "__main__":
    main()
