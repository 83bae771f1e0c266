"""A server under attack: secrets and files to attack, listeners on two ports, and a neighbour that trains."""

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
OBTAINED = "THE ATTACK OBTAINED"
"""Starts the error message of an attack that returns a text."""

DRY_RUN_SECONDS, CALL_SECONDS = 15, 6  # generous: a machine that runs many tests at once is slow
DRY_RUN_LENGTH = 8  # positions in the batch of the dry run; a batch in training has more

Attack = Callable[[dict[str, Any], Any], Any]  # Any: the logits, and what the attack obtains


@dataclass
class World:
    """A running server with its surroundings.

    touched: connections to the listeners. results: (loss, error) of each call of the neighbour. number: of attacks.
    """

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
    def existing_file(self) -> Path:
        return self.folder / "existing"

    def targets(self) -> dict[str, Any]:
        """The paths and addresses that an attack needs in order to succeed, and the first characters of the secrets."""
        self.number += 1
        return {
            "name": f"tinkerbell-hostile-{os.getpid()}-{self.number}",
            "canary": str(self.canary),
            "existing_file": str(self.existing_file),
            "data": str(self.folder / "data"),
            "secret_file": str(self.folder / "secret"),
            "secret_start": SECRET[:8],
            "marker_start": MARKER[:10],
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "url": self.url,
        }

    def upload(self, attack: Attack, phase: str) -> str:
        """Upload a loss that attacks in every phase, or only in training; its name."""
        name = f"{attack.__name__}_{phase}"
        # not as source: the client would run the attack in order to compare the results
        custom_loss(self.client, name=name, via="cloudpickle")(hostile(attack, self.targets(), phase))
        return name

    def train(self, name: str) -> Any:
        return self.client.hf_backend.forward_backward("attacked", ROWS, name)

    def harm(self, reply: str) -> list[str]:
        """The effects of an attack that it must not have. reply: all text that its author received."""
        found = [f"{path.name} in the canary folder" for path in self.canary.iterdir()]
        found += ["a file was changed"] if self._changed() else []
        found += self.touched
        found += [f"a secret as {name}" for name, text in _encodings(SECRET) if text in reply]
        found += [f"the neighbour's marker as {name}" for name, text in _encodings(MARKER) if text in reply]
        found += [f"{OBTAINED}: {reply[:300]}"] if OBTAINED in reply else []
        try:
            health = self.client.healthz()
        except TinkerbellError:
            return [*found, "the server does not answer"]
        found += ["the server was started again"] if health["boot_id"] != self.boot_id else []
        found += ["the engine was started again"] if health["restarts"] else []
        return found

    def restore(self) -> None:
        """Undo the changes of an attack."""
        for path in self.canary.iterdir():
            path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
        for path in self.folder.glob(f"{self.existing_file.name}*"):
            path.unlink()
        self.existing_file.write_text("unchanged")
        self.existing_file.chmod(0o600)
        self.touched.clear()

    def changes_for_the_neighbour(self, since: int) -> list[str]:
        """The differences in the neighbour's results after the first `since`; waits for one more result."""
        deadline = time.monotonic() + 30
        while len(self.results) <= since and time.monotonic() < deadline:
            time.sleep(0.02)
        new = self.results[since:]
        return (
            (["the neighbour has no result"] if not new else [])
            + [error for _, error in new if error]
            + (
                [f"the losses differ: {set(self.results)}"]
                if len({loss for loss, error in self.results if not error}) > 1
                else []
            )
        )

    def _changed(self) -> bool:
        path = self.existing_file
        return not path.exists() or path.read_text() != "unchanged" or path.stat().st_mode & 0o777 != 0o600


def hostile(attack: Attack, targets: dict[str, Any], phase: str) -> Callable[..., LossFnOutput]:
    """A loss that attacks. If the attack returns a text, the loss raises it; any other value is its output."""

    def loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        if phase == "upload" or model_outputs.shape[1] > DRY_RUN_LENGTH:
            result = attack(targets, model_outputs)
            if isinstance(result, str) and result:
                raise RuntimeError(f"{OBTAINED}: {result[:6000]}")
            if result is not None and not isinstance(result, str):
                return result  # type: ignore[no-any-return]
        return LossFnOutput(model_outputs.logsumexp(-1).sum())

    return loss


@contextmanager
def world(folder: Path, uploads: str) -> Iterator[World]:
    """A server with this setting of `uploads`, with its neighbour and its listeners."""
    (folder / "canary").mkdir()
    (folder / "secret").write_text(SECRET)
    os.environ["PLANTED"] = SECRET
    settings = {
        "uploads": uploads,
        "device": "cpu",
        "dry_run_seconds": DRY_RUN_SECONDS,
        "sandbox_seconds": CALL_SECONDS,
    }
    try:
        with (
            live_server(folder, **settings, seconds=300) as url,
            _listeners() as (tcp, udp),
            TinkerClient(url) as client,
        ):
            world = World(url, folder, tcp, udp, client)
            world.boot_id = client.healthz()["boot_id"]
            world.restore()
            for listen in (_listen_tcp, _listen_udp):
                threading.Thread(target=listen, args=(world,), daemon=True).start()
            neighbour = threading.Thread(target=_train, args=(world,))
            neighbour.start()
            try:
                yield world
            finally:
                world.stop.set()
                neighbour.join()
    finally:
        del os.environ["PLANTED"]


def _train(world: World) -> None:
    """Train as the neighbour: with an uploaded loss that contains a secret, and always with the same batch."""
    marker = MARKER

    def neighbours_loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        return LossFnOutput((model_outputs.logsumexp(-1) * attention_mask).sum() * len(marker))

    with TinkerClient(world.url) as client:
        custom_loss(client, name="neighbours_loss", via="cloudpickle")(neighbours_loss)
        client.hf_backend.create_model("neighbour", seed=3)
        while not world.stop.is_set():
            try:
                losses = [
                    client.hf_backend.forward("neighbour", ROWS, name).loss
                    for name in ("neighbours_loss", "cross_entropy")
                ]
                world.results.append((losses[0] + losses[1], ""))
            except TinkerbellError as error:
                world.results.append((0.0, str(error)))
            time.sleep(0.05)


@contextmanager
def _listeners() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        yield tcp, udp


def _listen_tcp(world: World) -> None:
    try:
        while True:
            world.tcp.accept()[0].close()
            world.touched.append("a connection to the TCP port")
    except OSError:
        return


def _listen_udp(world: World) -> None:
    try:
        while True:
            world.udp.recv(100)
            world.touched.append("a packet to the UDP port")
    except OSError:
        return


def _encodings(text: str) -> list[tuple[str, str]]:
    raw = text.encode()
    return [
        ("plain text", text),
        ("base64", base64.b64encode(raw).decode().rstrip("=")[:-2]),
        ("base32", base64.b32encode(raw).decode().rstrip("=")[:-2]),
        ("hex", raw.hex()),
        ("reversed text", text[::-1]),
        ("numbers", ", ".join(map(str, raw))),
    ]
