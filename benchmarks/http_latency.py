"""Latency of single calls and calls per second over HTTP; `--against CHECKOUT` compares them with another checkout.

Latency is the time from sending the request to receiving its result: a POST and a GET, except for `healthz`.
Each round measures every server once, in an order that alternates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import _common
from _server import Connection, server

ROWS, LENGTH, TOKENS, CLIENTS, MODEL = 4, 32, 4, 64, "bench"
CALLS = {"fake": 1.0, "tiny": 0.2}
"""The engines (the fake one of the HTTP tests, the embedded tiny model), and their shares of `--calls` in a round."""

Call = Callable[[Connection], Awaitable[object]]
Sample = dict[str, list[float]]
"""The measurements of one server in one round: name of the call → seconds of each call, or a list with one rate."""


def body(**fields: object) -> bytes:
    return json.dumps({"model_id": MODEL, **fields}).encode()


DATA = [[(row + 7 * position) % 250 for position in range(LENGTH)] for row in range(ROWS)]
FORWARD_BACKWARD = body(data=DATA)
CALLS_OF_ONE_CLIENT: dict[str, Call] = {
    "healthz": lambda connection: connection.request("/healthz"),
    "forward_backward": lambda connection: connection.call("forward_backward", FORWARD_BACKWARD),
    "optim_step": lambda connection: connection.call("optim_step", body(learning_rate=1e-5)),
    "sample": lambda connection: connection.call("sample", body(prompt=DATA[0][:8], max_tokens=TOKENS, seed=0)),
}


async def latencies(url: str, calls: int) -> Sample:
    """Seconds of each call of one client. Every optim_step follows a forward_backward, so that there is a gradient."""
    seconds: Sample = {name: [] for name in CALLS_OF_ONE_CLIENT}
    async with Connection.open(url) as connection:
        for _ in range(calls):
            for name, call in CALLS_OF_ONE_CLIENT.items():
                started = time.perf_counter()
                await call(connection)
                seconds[name].append(time.perf_counter() - started)
    return seconds


async def rate(url: str, calls: int, clients: int) -> float:
    """forward_backward calls per second of several clients; each waits for a result before its next call."""

    async def client(connection: Connection, count: int) -> None:
        for _ in range(count):
            await connection.call("forward_backward", FORWARD_BACKWARD)

    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection.open(url)) for _ in range(clients)]
        count = -(-calls // clients)
        started = time.perf_counter()
        await asyncio.gather(*(client(connection, count) for connection in connections))
        return count * clients / (time.perf_counter() - started)


async def pipelined_rate(url: str, calls: int) -> float:
    """forward_backward calls per second of one client that sends all of them before it waits for the first result."""
    async with Connection.open(url) as connection:
        started = time.perf_counter()
        ids = [await connection.submit("forward_backward", FORWARD_BACKWARD) for _ in range(calls)]
        for request_id in ids:
            await connection.result(request_id)
        return calls / (time.perf_counter() - started)


def round_of(url: str, calls: int) -> Sample:
    """Measure one server once."""

    async def measured() -> Sample:
        return await latencies(url, calls) | {
            "1 client": [await rate(url, calls, 1)],
            f"{CLIENTS} clients": [await rate(url, calls, CLIENTS)],
            "pipelined": [await pipelined_rate(url, calls)],
        }

    return asyncio.run(measured())


async def prepare(url: str) -> None:
    """Create the model, and send each kind of call three times."""
    async with Connection.open(url) as connection:
        await connection.call("create_model", body(rank=4))
        for _ in range(3):
            for call in CALLS_OF_ONE_CLIENT.values():
                await call(connection)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def figures(sample: Sample) -> dict[str, float]:
    """The numbers of one round: milliseconds at two percentiles of each call, and calls per second."""
    found = {}
    for name, values in sample.items():
        if name in CALLS_OF_ONE_CLIENT:
            found |= {f"{name} p{p}, ms": 1000 * percentile(values, p) for p in (50, 99)}
        else:
            found[f"forward_backward, {name}, calls/s"] = values[0]
    return found


def table(engine: str, rounds: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, object]]:
    """The lines of one engine. rounds: the figures of each server in each round, this checkout first."""
    lines: list[dict[str, object]] = []
    for name in rounds[0][0]:
        values = [[one[name] for one in servers] for servers in zip(*rounds, strict=True)]
        line = _common.row(f"{engine}: {name}", values[0])
        if len(values) == 2:
            ratios = [this / other for this, other in zip(*values, strict=True)]
            line |= {
                "other": round(statistics.median(values[1]), 3),
                "this / other": round(statistics.median(ratios), 3),
            }
            line |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
        lines.append(line)
    return lines


def measure(roots: Sequence[Path], engine: str, pairs: int, calls: int, device: str) -> list[dict[str, object]]:
    """The lines of one engine: a server of each checkout, measured in turn."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(
                server(
                    root,
                    Path(folder, f"data-{index}"),
                    fake=engine == "fake",
                    device=device,
                    rate_limit=0,
                    concurrency_limit=256,
                )
            )
            for index, root in enumerate(roots)
        ]
        for url in urls:
            asyncio.run(prepare(url))
        rounds = []
        for number in range(pairs):
            order = sorted(range(len(urls)), reverse=bool(number % 2))
            measured = {index: figures(round_of(urls[index], calls)) for index in order}
            rounds.append([measured[index] for index in range(len(urls))])
    return table(engine, rounds)


def main() -> None:
    options = _common.options(__doc__, pairs=5)
    options.add_argument("--calls", type=int, default=200, help="calls of each kind in one round")
    options.add_argument("--engine", choices=CALLS, action="append", help="measure this engine only")
    options.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    args = options.parse_args()
    roots = [Path(__file__).parents[1], *([args.against.resolve()] if args.against else [])]
    rows = []
    for engine in args.engine or CALLS:
        calls = max(2, round(args.calls * CALLS[engine]))
        rows += measure(roots, engine, args.pairs, calls, args.device)
    details = {"device": args.device, "rounds": args.pairs, "calls": args.calls, "rows": f"{ROWS}x{LENGTH}"}
    if args.against:
        details["other"] = str(roots[1])
    _common.show("HTTP latency", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
