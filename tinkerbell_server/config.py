"""What a server is started with: one frozen value, checked once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tinkerbell_core.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `tinkerbell serve`. port 0: a free one. model None: the embedded tiny model.

    uploads "sandboxed": uploaded losses run in locked-down processes; "trusted": with the rights of the server, and
    refused unless host is loopback. A call of a sandboxed loss may take sandbox_seconds, and sandbox_seconds_per_token
    for each padded token; its trial dry_run_seconds. sandbox_memory: MiB it may have, None: by the machine.
    dotted_losses: a loss_fn `my.module:function` is imported, with the rights of the server; loopback only, as above.
    auth "auto": API keys are asked for once there is one, and always unless host is loopback.
    body_limit: MiB of a request with data; rate_limit: requests of a key a minute, 0 for no limit; concurrency_limit:
    requests of a key at once; queue_limit: requests that wait for the engine, of which a tenant may have half;
    upload_limit: versions of uploaded losses that a tenant may keep.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: str = "tinkerbell-data"
    uploads: Literal["off", "sandboxed", "trusted"] = "sandboxed"
    sandbox_seconds: float = 10.0
    sandbox_seconds_per_token: float = 0.002
    dry_run_seconds: float = 5.0
    sandbox_memory: int | None = None
    dotted_losses: bool = False
    auth: Literal["auto", "on", "off"] = "auto"
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    body_limit: int = 256
    rate_limit: int = 6000
    concurrency_limit: int = 64
    queue_limit: int = 2048
    upload_limit: int = 1000
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    attn: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    micro_batch_tokens: int | None = None
    logits_budget: int | None = None
    gradient_checkpointing: bool = False
    plugins: bool = True
    disabled_plugins: tuple[str, ...] = ()
    required_plugins: tuple[str, ...] = ()
    chat_tokens: Literal["assistant", "all"] = "assistant"
    engine: str = "tinkerbell_server.engines.torch"

    def __post_init__(self) -> None:
        if self.uploads not in ("off", "sandboxed", "trusted"):
            raise BadRequest(f"uploads is {self.uploads!r}, but must be 'off', 'sandboxed' or 'trusted'")
        if min(self.sandbox_seconds, self.dry_run_seconds) <= 0 or self.sandbox_seconds_per_token < 0:
            raise BadRequest("a sandbox needs more than no time: see sandbox_seconds and dry_run_seconds")
        if self.sandbox_memory is not None and self.sandbox_memory < 256:
            raise BadRequest(f"sandbox_memory is {self.sandbox_memory} MiB, but must be at least 256")
        if self.uploads == "trusted" and not self.on_loopback:
            raise BadRequest(
                f"--uploads trusted runs what is uploaded with your rights, so it is refused on host {self.host!r}; "
                "serve on --host 127.0.0.1, or use --uploads sandboxed"
            )
        if self.dotted_losses and not self.on_loopback:
            raise BadRequest(
                f"--dotted-losses imports what a request names, so it is refused on host {self.host!r}; "
                "serve on --host 127.0.0.1, or install the loss as a plugin"
            )
        if self.auth not in ("auto", "on", "off"):
            raise BadRequest(f"auth is {self.auth!r}, but must be 'auto', 'on' or 'off'")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise BadRequest("ssl_keyfile is there, but ssl_certfile is not: TLS needs the certificate too")
        limits = {"body_limit": 1, "rate_limit": 0, "concurrency_limit": 1, "queue_limit": 2, "upload_limit": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise BadRequest(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if not 0 <= self.port <= 65535:
            raise BadRequest(f"port is {self.port}, but must be between 0 and 65535")
        if self.chat_tokens not in ("assistant", "all"):
            raise BadRequest(f"chat_tokens is {self.chat_tokens!r}, but must be 'assistant' or 'all'")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise BadRequest(f"micro_batch_tokens is {self.micro_batch_tokens}, but must be at least 1")
        if self.logits_budget is not None and self.logits_budget < 0:
            raise BadRequest(f"logits_budget is {self.logits_budget}, but must be a number of bytes, at least 0")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser().resolve()

    def to_json(self) -> bytes:
        """The settings as they are sent to another process."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Settings:
        """The settings that `to_json` encoded. Raises BadRequest for a value that is not allowed."""
        return msgspec.json.decode(text, type=cls)
