"""Sessions of Tinker clients: configuration, start, heartbeat and end."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from tinkerbell_core.errors import TooManyRequests
from tinkerbell_server.access.tenants import visible
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.requests import Gone, TinkerRequests
from tinkerbell_server.api.tinker.store import Session
from tinkerbell_server.config import Settings


# Any: JSON values of several types
def client_config(settings: Settings, *, limited: bool, takes_losses: bool) -> dict[str, Any]:
    """The configuration that a client reads before its first session.

    limited: whether the number of its concurrent requests is limited. takes_losses: whether this client may send
    losses; otherwise its SDK runs them locally, as two passes.
    """
    body_limit = settings.body_limit << 20
    # fewer than the results that are kept; each sample is a request that waits
    samples = max(1, settings.concurrency_limit // 2) if limited else 512
    return {
        "pjwt_auth_enabled": False,
        "credential_default_source": "api_key",
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": False,
        # chunks as large as a body may be, so that a loss usually sees its whole batch in one request
        "fwdbwd_max_chunk_len": 1 << 16,
        "fwdbwd_max_chunk_bytes_count": body_limit // 2,
        "fwdbwd_dispatch_bytes_semaphore_size": body_limit,
        "sample_max_concurrent_requests": min(512, samples),
        "sample_use_retrieve_futures": False,
        "custom_loss_server_side": takes_losses,
        "sample_join_sampling_session": True,
    }


class Sessions:
    """The sessions of one server."""

    def __init__(self, requests: TinkerRequests) -> None:
        self._requests = requests

    async def create(self, tenant: str, body: bytes) -> dict[str, Any]:  # Any: JSON values of several types
        """create_session: the answer with the id of the new session."""
        sent = protocol.parse(body, protocol.CreateSession)
        have = sum(not one.ended for one in self._requests.store.of_tenant(Session, tenant))
        limit = self._requests.service.settings.session_limit
        if have >= limit:
            raise TooManyRequests(
                f"you have {have} open sessions, and {limit} is the limit for one tenant: end some; one without a "
                "heartbeat ends after an hour (see docs/operators.md#limits)",
                retry_after=60.0,
            )
        session = Session(
            id=secrets.token_hex(16),
            tenant=tenant,
            last_seen=time.time(),
            tags=sent.tags,
            user_metadata=sent.user_metadata,
            project_id=sent.project_id,
            display_name=sent.display_name,
        )
        self._requests.store.put(session)
        engine = await self._requests.engine()
        message = (
            f"Tinkerbell: {self._requests.base.name} on {engine.device}, {len(visible(tenant, engine.losses))} losses"
        )
        return {"type": "create_session", "session_id": session.id, "info_message": message}

    def heartbeat(self, tenant: str, body: bytes) -> None:
        """Note that a client is alive. Raises Gone if the session has ended, so that the client stops."""
        sent = protocol.parse(body, protocol.Heartbeat)
        session = self._requests.store.get(Session, sent.session_id, tenant)
        if session is None or session.ended:
            raise Gone(f"session {sent.session_id[:80]!r} has ended, or belongs to another server")
        self._requests.store.put(msgspec.structs.replace(session, last_seen=time.time()))

    def finish(self, tenant: str, session_id: str, body: bytes) -> None:
        """End a session and its requests; the reaper then frees everything that was not saved by name."""
        sent = protocol.parse(body, protocol.Finish)
        session = self._requests.session(tenant, session_id)
        reason = str(sent.reason.get("type", "success"))[:40]
        ended = msgspec.structs.replace(session, ended=True, reason=reason, detail=(sent.detail or "")[:1000] or None)
        self._requests.store.put(ended)
        self._requests.cancel_session(ended)
