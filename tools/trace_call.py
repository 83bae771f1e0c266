"""Counts the files that one request passes through, and the moves between them.

    python -m tools.trace_call [--root OTHER_CHECKOUT] [--repeat 3] [--json FILE] [--files]

Starts a real server on the embedded tiny model, with a recorder in the API process and in each process that it starts
(see `tools.recorder`), and sends three requests, after a warm-up: a native `forward_backward` with one poll of its
future, a `forward_backward` of the stock Tinker SDK (if it is installed), and a `/v1/chat/completions`. A recording
begins before the request is sent and ends when its result is in the client's hands.

A *call* is a call of a Python function that is defined in one of the project's files, or the resumption of such a
coroutine or generator. A *move* is a call in another file than that of the previous call in the same thread; the first
call in a thread is a move too. Returns are not moves. `moves with returns` counts the calls and returns in another file
than that of the previous call or return. All threads count, and all processes of the server that are not sandboxed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from tools import recorder

PACKAGES = ["tinkerbell_core", "tinkerbell_server", "tinker_client"]
START_SECONDS = 180.0
SIGNAL_SECONDS = 10.0
FREQUENT = 20
ROWS = [[1, 2, 3], [4, 5]]
CHAT = [{"role": "user", "content": "Say a word."}]


@dataclass(frozen=True, slots=True)
class Recording:
    """The events of one process during one request."""

    process: str
    events: list[recorder.Event]

    @property
    def calls(self) -> dict[str, int]:
        """The number of calls in each file, in the order in which the files were entered."""
        counts: dict[str, int] = {}
        for _, event, file, _, _ in self.events:
            if event == "call":
                counts[file] = counts.get(file, 0) + 1
        return counts

    def moves(self, *, returns: bool = False) -> list[tuple[str, str]]:
        """The moves in their order, from a file ("" for the first call in a thread) to a file.

        returns: with those of returns; see the docstring of this module.
        """
        last: dict[int, str] = {}
        moves = []
        for thread, event, file, _, _ in self.events:
            if event == "call" or returns:
                if last.get(thread) != file:
                    moves.append((last.get(thread, ""), file))
                last[thread] = file
        return moves


class TracedServer:
    """A running server whose processes record when they are signalled."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self._folder = url, folder

    def record(self, request: Callable[[], object]) -> list[Recording]:
        """Send a request; what each process did meanwhile, without the processes that did nothing."""
        processes = self._processes()
        self._signal(processes, signal.SIGUSR1, "recording")
        try:
            request()
        finally:
            self._signal(processes, signal.SIGUSR2, "json")
        recordings = []
        for pid in processes:
            written = self._folder / f"{pid}.json"
            content = json.loads(written.read_text())
            written.unlink()
            if content["events"]:
                events = [tuple(event) for event in content["events"]]
                recordings.append(Recording(_process_name(content["command"]), events))
        return sorted(recordings, key=lambda recording: recording.process)

    def _processes(self) -> list[int]:
        pids = [int(file.stem) for file in self._folder.glob("*.ready")]
        return [pid for pid in pids if self._records(pid)]

    def _records(self, pid: int) -> bool:
        """Whether the process is alive and one of ours: in a sandbox, a process has another id than outside."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return os.fsencode(f"TRACE_FOLDER={self._folder}") in environment.split(b"\0")

    def _signal(self, pids: Sequence[int], number: signal.Signals, suffix: str) -> None:
        for pid in pids:
            os.kill(pid, number)
        deadline = time.monotonic() + SIGNAL_SECONDS
        while not all((self._folder / f"{pid}.{suffix}").exists() for pid in pids):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not every process of the server answered {number.name} in {SIGNAL_SECONDS:g} s")
            time.sleep(0.01)


def _process_name(command: Sequence[str]) -> str:
    """The module that `python -m` runs in this process, without the package of the server."""
    module = command[command.index("-m") + 1] if "-m" in command else command[-1]
    return {"tinkerbell_server": "API process"}.get(module, module.removeprefix("tinkerbell_server."))


@contextlib.contextmanager
def traced_server(root: Path) -> Iterator[TracedServer]:
    """Start `tinkerbell serve` with the code in `root`, and stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="trace-call-") as name:
        folder = Path(name)
        hook, recordings = folder / "hook", folder / "recordings"
        hook.mkdir()
        recordings.mkdir()
        shutil.copy(recorder.__file__, hook / "sitecustomize.py")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKERBELL_")}
        environment |= {
            # the plugins of the same checkout: those that are installed may need another version of tinkerbell_core
            "PYTHONPATH": os.pathsep.join(map(str, [hook, root, *sorted(root.glob("plugins/*/src"))])),
            "TRACE_FOLDER": str(recordings),
            "TRACE_ROOT": str(root),
            "TRACE_PACKAGES": " ".join(PACKAGES),
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tinkerbell_server", "--port", str(port), "--data-dir", str(folder / "data")]
        log = folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--device", "cpu"], cwd=folder, env=environment, stdout=output, stderr=output
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield TracedServer(url, recordings)
        finally:
            process.terminate()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz", trust_env=False).json()["status"] == "ok":
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start; the end of its log is:\n{log.read_text(errors='replace')[-4000:]}")


def native_request(http: httpx.Client) -> Callable[[], object]:
    """`forward_backward` of two rows of token ids, and its result."""

    def call(kind: str, **body: object) -> object:
        accepted = http.post(f"/{kind}", json={"model_id": "traced", **body}).raise_for_status().json()
        future = http.get(f"/futures/{accepted['request_id']}", params={"wait": 30}).raise_for_status().json()
        if future["state"] != "done":
            raise RuntimeError(f"{kind} failed: {future}")
        return future

    call("create_model")
    return lambda: call("forward_backward", data=ROWS)


def chat_request(http: httpx.Client) -> Callable[[], object]:
    """A chat completion of two tokens by the base model."""
    model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "messages": CHAT, "max_tokens": 2, "temperature": 0}
    return lambda: http.post("/v1/chat/completions", json=body).raise_for_status()


def tinker_request(url: str, base_model: str) -> Callable[[], object]:
    """`forward_backward` of the Tinker SDK on the same two rows, and its result."""
    os.environ |= {"TINKER_API_KEY": "tml-trace", "TINKER_TELEMETRY": "0"}
    import tinker
    import torch

    service = tinker.ServiceClient(base_url=url)
    model: Any = service.create_lora_training_client(base_model=base_model, rank=4)  # Any: differs by SDK version
    if hasattr(model, "result"):  # SDK 0.36 and later
        model = model.result()
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_torch(torch.tensor(row[1:])),
                "weights": tinker.TensorData.from_torch(torch.ones(len(row) - 1)),
            },
        )
        for row in ROWS
    ]
    return lambda: model.forward_backward(data, "cross_entropy").result()


def trace(root: Path, repeat: int) -> dict[str, list[list[Recording]]]:
    """The recordings of each request: one list for each repetition, with one item for each process."""
    with traced_server(root) as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            "native forward_backward": lambda: native_request(http),
            "Tinker forward_backward": lambda: tinker_request(server.url, http.get("/healthz").json()["base_model"]),
            "chat completion": lambda: chat_request(http),
        }
        if find_spec("tinker") is None:
            del makers["Tinker forward_backward"]
            print("the Tinker SDK is not installed: its request is left out", file=sys.stderr)
        traced = {}
        for name, make in makers.items():
            request = make()
            for _ in range(2):  # the first calls import modules and fill caches
                request()
            traced[name] = [server.record(request) for _ in range(repeat)]
    return traced


def summary(name: str, repetitions: Sequence[Sequence[Recording]], *, files: bool) -> Iterator[str]:
    """The lines that describe the repetition with the fewest moves, as timers of the server only add moves."""
    totals = [sum(len(recording.moves()) for recording in recordings) for recordings in repetitions]
    chosen = repetitions[totals.index(min(totals))]
    yield f"{name}  (moves of each repetition: {', '.join(map(str, totals))})"
    yield f"  {'process':<24}{'files':>7}{'calls':>7}{'moves':>7}{'moves with returns':>20}"
    sums = [0, 0, 0, 0]
    for recording in chosen:
        calls = recording.calls
        numbers = [len(calls), sum(calls.values()), len(recording.moves()), len(recording.moves(returns=True))]
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
        yield _line(recording.process, numbers)
    yield _line("total", sums) + f"   ({len({file for one in chosen for file in one.calls})} distinct files)"
    if files:
        for recording in chosen:
            yield f"  files of {recording.process}, in the order in which they are entered, with the number of calls:"
            for file, count in recording.calls.items():
                yield f"    {count:>5}  {file}"
            yield f"  the most frequent moves of {recording.process}:"
            for (before, after), count in Counter(recording.moves()).most_common(FREQUENT):
                yield f"    {count:>5}  {before or '(start of a thread)'} -> {after}"


def _line(process: str, numbers: Sequence[int]) -> str:
    files, calls, moves, with_returns = numbers
    return f"  {process:<24}{files:>7}{calls:>7}{moves:>7}{with_returns:>20}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to trace")
    parser.add_argument("--repeat", type=int, default=3, help="how often each request is recorded")
    parser.add_argument("--files", action="store_true", help="also list the files and the most frequent moves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every recorded call and return to this file")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    print(f"traced: {root}")
    traced = trace(root, options.repeat)
    for name, repetitions in traced.items():
        print()
        for line in summary(name, repetitions, files=options.files):
            print(line)
    if options.json is not None:
        content: dict[str, Any] = {  # Any: JSON
            name: [{one.process: one.events for one in recordings} for recordings in repetitions]
            for name, repetitions in traced.items()
        }
        options.json.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
