"""What surrounds the server under attack: things to steal and to spoil, ears on two ports, and a neighbour at work."""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.live import live_server
from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core.errors import TinkerbellError

SECRET = "planted-7f3a9c51e0b2"
MARKER = "neighbour-b81d40aa93fe"
ROWS = ["All children, except one, grow up.", "Second star to the right."]
TRIAL, CALL = 15, 6  # seconds; a machine that runs many tests at once is slow
SHORT = 8  # positions of the trial's batch; in training there are more

Attack = Callable[[dict[str, Any], Any], Any]  # Any: what an attack is told, and what it got


@dataclass
class World:
    """`harm` says what of all this an attack has reached, and `neighbour_saw` what of it the neighbour noticed."""

    url: str
    folder: Path
    tcp: socket.socket
    udp: socket.socket
    client: TinkerClient
    boot_id: str = ""
    touched: list[str] = field(default_factory=list)
    results: list[tuple[float, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    number: int = 0

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def where(self) -> dict[str, Any]:
        """What an attack is told: all it needs to succeed, but for the secrets themselves."""
        self.number += 1
        return {
            "name": f"tinkerbell-hostile-{os.getpid()}-{self.number}",
            "canary": str(self.canary),
            "kept": str(self.kept),
            "data": str(self.folder / "data"),
            "secret_file": str(self.folder / "secret"),
            "secret_start": SECRET[:8],
            "marker_start": MARKER[:10],
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "url": self.url,
        }

    def upload(self, attack: Attack, when: str) -> str:
        """Upload a loss that attacks when it is tried, or behaves then and attacks in training; its name."""
        name = f"{attack.__name__}_{when}"
        # not as source: to see whether that is the same, the client would run the attack
        custom_loss(self.client, name=name, via="cloudpickle")(hostile(attack, self.where(), when))
        return name

    def train(self, name: str) -> Any:
        return self.client.hf_backend.forward_backward("attacked", ROWS, name)

    def harm(self, told: str) -> list[str]:
        """What an attack has reached. told: every word that came back to its author."""
        found = [f"{path.name} in the canary folder" for path in self.canary.iterdir()]
        found += ["a file was changed"] if self._changed() else []
        found += self.touched
        found += [f"a secret as {how}" for how, text in _disguises(SECRET) if text in told]
        found += [f"the neighbour's marker as {how}" for how, text in _disguises(MARKER) if text in told]
        found += ["GOT SOMETHING: " + told[:300]] if "GOT SOMETHING" in told else []
        try:
            health = self.client.healthz()
        except TinkerbellError:
            return [*found, "the server is gone"]
        found += ["another server"] if health["boot_id"] != self.boot_id else []
        found += ["the engine was started again"] if health["restarts"] else []
        return found

    def restore(self) -> None:
        for path in self.canary.iterdir():
            path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
        for path in self.folder.glob("kept*"):
            path.unlink()
        self.kept.write_text("kept")
        self.kept.chmod(0o600)
        self.touched.clear()

    def neighbour_saw(self, since: int) -> list[str]:
        """What changed for the neighbour: it must go on, with the numbers it always had."""
        deadline = time.monotonic() + 30
        while len(self.results) <= since and time.monotonic() < deadline:
            time.sleep(0.02)
        new = self.results[since:]
        return (
            (["no result"] if not new else [])
            + [error for _, error in new if error]
            + (
                [f"other numbers: {set(self.results)}"]
                if len({loss for loss, error in self.results if not error}) > 1
                else []
            )
        )

    def _changed(self) -> bool:
        return not self.kept.exists() or self.kept.read_text() != "kept" or self.kept.stat().st_mode & 0o777 != 0o600


def hostile(attack: Attack, where: dict[str, Any], when: str) -> Callable[..., LossFnOutput]:
    """A loss with an attack in it."""

    def loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        if when == "upload" or model_outputs.shape[1] > SHORT:
            got = attack(where, model_outputs)
            if isinstance(got, str) and got:
                raise RuntimeError(f"GOT SOMETHING: {got[:6000]}")
            if got is not None and not isinstance(got, str):
                return got  # type: ignore[no-any-return]
        return LossFnOutput(model_outputs.logsumexp(-1).sum())

    return loss


@contextmanager
def world(folder: Path, uploads: str) -> Iterator[World]:
    """A server with these uploads, and all that is around it."""
    (folder / "canary").mkdir()
    (folder / "secret").write_text(SECRET)
    os.environ["PLANTED"] = SECRET
    settings = {"uploads": uploads, "device": "cpu", "dry_run_seconds": TRIAL, "sandbox_seconds": CALL}
    try:
        with live_server(folder, **settings, seconds=300) as url, _ears() as (tcp, udp), TinkerClient(url) as client:
            made = World(url, folder, tcp, udp, client)
            made.boot_id = client.healthz()["boot_id"]
            made.restore()
            for ear in (_hear_tcp, _hear_udp):
                threading.Thread(target=ear, args=(made,), daemon=True).start()
            neighbour = threading.Thread(target=_work, args=(made,))
            neighbour.start()
            try:
                yield made
            finally:
                made.stop.set()
                neighbour.join()
    finally:
        del os.environ["PLANTED"]


def _work(world: World) -> None:
    """The neighbour: an uploaded loss with a secret in it, and the same batch again and again."""
    marker = MARKER

    def own(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        return LossFnOutput((model_outputs.logsumexp(-1) * attention_mask).sum() * len(marker))

    with TinkerClient(world.url) as client:
        custom_loss(client, name="neighbours_own", via="cloudpickle")(own)
        client.hf_backend.create_model("neighbour", seed=3)
        while not world.stop.is_set():
            try:
                losses = [
                    client.hf_backend.forward("neighbour", ROWS, name).loss
                    for name in ("neighbours_own", "cross_entropy")
                ]
                world.results.append((losses[0] + losses[1], ""))
            except TinkerbellError as error:
                world.results.append((0.0, str(error)))
            time.sleep(0.05)


@contextmanager
def _ears() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        yield tcp, udp


def _hear_tcp(world: World) -> None:
    try:
        while True:
            world.tcp.accept()[0].close()
            world.touched.append("somebody connected")
    except OSError:
        return


def _hear_udp(world: World) -> None:
    try:
        while True:
            world.udp.recv(100)
            world.touched.append("somebody sent a packet")
    except OSError:
        return


def _disguises(text: str) -> list[tuple[str, str]]:
    raw = text.encode()
    return [
        ("it is", text),
        ("base64", base64.b64encode(raw).decode().rstrip("=")[:-2]),
        ("base32", base64.b32encode(raw).decode().rstrip("=")[:-2]),
        ("hex", raw.hex()),
        ("its reverse", text[::-1]),
        ("numbers", ", ".join(map(str, raw))),
    ]
