"""Sampling sessions of Tinker clients: of the base model, of a checkpoint, or of the weights of a run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.access.tenants import Caller, qualified, unqualified
from tinkerbell_server.api.tinker import decode_sample, protocol
from tinkerbell_server.api.tinker.checkpoints import Checkpoints, sampler_id_of
from tinkerbell_server.api.tinker.paths import TinkerPath
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Run, Sampler, StoredRequest
from tinkerbell_server.service.store import Finished
from tinkerbell_server.service.submissions import Submission

CLONE = 1_000_000_000
"""A clone of a sampling session numbers its requests from its own number times this."""


class Sampling:
    """The sampling sessions of one server."""

    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def create_session(self, tenant: str, body: bytes) -> str:
        """create_sampling_session: the id of the new session."""
        sent = protocol.parse(body, protocol.CreateSamplingSession)
        session = self._requests.session(tenant, sent.session_id)
        if sent.base_model is not None:
            self._requests.base.check(sent.base_model)
        elif sent.model_path is None:
            raise BadRequest("create_sampling_session needs a base_model or a model_path")
        checkpoint = None if sent.model_path is None else self._checkpoints.find(tenant, sent.model_path)
        sampler = Sampler(
            id=sampler_id_of(session.id, sent.sampling_session_seq_id),
            tenant=tenant,
            parent=session.id,
            base_model=self._requests.base.name,
            model_path=None if checkpoint is None else str(TinkerPath.parse(checkpoint.id)),
            folder=None if checkpoint is None else checkpoint.folder,
        )
        self._requests.store.put(sampler)
        return sampler.id

    def join(self, tenant: str, sampler_id: str) -> int:
        """join_sampling_session: the number of the new clone, from 1."""
        sampler = self._requests.sampler(tenant, sampler_id)
        self._requests.store.put(msgspec.structs.replace(sampler, clones=sampler.clones + 1))
        return sampler.clones + 1

    def describe(self, tenant: str, sampler_id: str) -> dict[str, str]:
        """The answer of GET /samplers/{id}."""
        sampler = self._requests.sampler(tenant, sampler_id)
        answer = {"sampler_id": sampler.id, "base_model": sampler.base_model}
        return answer if sampler.model_path is None else {**answer, "model_path": sampler.model_path}

    async def sample(self, caller: Caller, body: bytes) -> tuple[str, list[str]]:
        """asample: the request's id, and an id for each sequence of its result."""
        engine = await self._requests.engine()
        sent = protocol.parse(body, protocol.Sample)
        sampler = self._sampler(caller.tenant, sent)
        follows = sampler.follows is not None
        request, options = decode_sample.sample_request(sent, engine)
        submission = Submission(
            caller=caller,
            kind="sample",
            content=request,
            sample=replace(options, path=self._folder(sampler)),
            key=f"{sampler.id}/{sent.seq_id if sent.seq_id is not None else f'at/{time.time_ns()}'}",
            # samples with the same weights share a lane, so that they are drawn together
            lane=sampler.id if follows else None,
        )
        record = StoredRequest(
            id="", tenant=caller.tenant, parent=sampler.id, kind="sample", layout=decode_sample.layout_of(sent)
        )
        request_id = await self._requests.submit(submission, body, record)
        return request_id, [f"{unqualified(request_id)}-{index}" for index in range(sent.num_samples)]

    # Any: JSON values of several types
    async def retrieve_futures(self, tenant: str, body: bytes, most: float) -> dict[str, Any]:
        """The requests of a session that ended since the client's last question; waits at most `most` seconds."""
        sent = protocol.parse(body, protocol.RetrieveFutures)
        sampler = self._requests.sampler(tenant, sent.target.sampling_session_id)
        seconds = most if sent.timeout is None else min(most, sent.timeout)
        found = await self._requests.service.futures.finished(qualified(tenant, sampler.id), sent.prev_cursor, seconds)
        own = [one for one in found if _clone_of(one.key) == sent.target.cloned_sampler_id]
        return {
            "completions": [_completion(one) for one in own],
            "cursor": found[-1].at if found else sent.prev_cursor,
        }

    def _sampler(self, tenant: str, sent: protocol.Sample) -> Sampler:
        if sent.sampling_session_id is not None:
            return self._requests.sampler(tenant, sent.sampling_session_id)
        if sent.model_path is not None:
            folder: str | None = self._checkpoints.find(tenant, sent.model_path).folder
        else:
            self._requests.base.check(sent.base_model or self._requests.base.name)
            folder = None
        name = f"sampler:{sent.model_path or 'base'}"
        return Sampler(id=name, tenant=tenant, base_model=self._requests.base.name, folder=folder)

    def _folder(self, sampler: Sampler) -> str | None:
        """The weights of a sampler; the newest of its run, if it follows one."""
        run = None if sampler.follows is None else self._requests.store.get(Run, sampler.follows)
        return sampler.folder if run is None else run.follower


def _clone_of(key: str | None) -> int | None:
    """The number of the clone that sent a sample, from the seq_id at the end of its key."""
    seq = (key or "").rpartition("/")[2]
    return int(seq) // CLONE if seq.isdecimal() else None


# Any: JSON values of several types
def _completion(one: Finished) -> dict[str, Any]:
    if not one.done:
        return {"state": "failed", "request_id": unqualified(one.id)}
    size = {"response_payload_uncompressed_size": one.size}
    return {"state": "finished", "request_id": unqualified(one.id), **size}
