"""What a server is started with: one frozen value, checked once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.engines.base import EngineConfig

BODY_LIMIT = 256 << 20
"""The most bytes a request's body may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `tinkerbell serve`. port 0: a free one. model None: the embedded tiny model.

    uploads "trusted": uploaded losses run with the rights of the server; refused unless host is loopback.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data_dir: str = "tinkerbell-data"
    uploads: Literal["off", "trusted"] = "off"
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
    engine: Literal["torch", "fake"] = "torch"

    def __post_init__(self) -> None:
        if self.uploads not in ("off", "trusted"):
            raise BadRequest(f"uploads is {self.uploads!r}, but must be 'off' or 'trusted'")
        if self.uploads == "trusted" and not self.on_loopback:
            raise BadRequest(
                f"--uploads trusted runs what is uploaded with your rights, so it is refused on host {self.host!r}; "
                "serve on --host 127.0.0.1, or leave uploads off"
            )
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

    def engine_config(self) -> EngineConfig:
        """The part of the settings that the engine needs."""
        return EngineConfig(
            engine=self.engine,
            model=self.model,
            data_dir=str(self.data_path),
            device=self.device,
            dtype=self.dtype,
            attn=self.attn,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            micro_batch_tokens=self.micro_batch_tokens,
            logits_budget=self.logits_budget,
            gradient_checkpointing=self.gradient_checkpointing,
            plugins=self.plugins,
            disabled_plugins=self.disabled_plugins,
            required_plugins=self.required_plugins,
            chat_tokens=self.chat_tokens,
        )
