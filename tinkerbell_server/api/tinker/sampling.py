"""Samplers of Tinker clients: the base model, a checkpoint, or a run's weights as they were."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.access.tenants import qualified, unqualified
from tinkerbell_server.api.tinker import decode_sample, protocol
from tinkerbell_server.api.tinker.checkpoints import Checkpoints, sampler_id_of
from tinkerbell_server.api.tinker.paths import TinkerPath
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Run, Sampler
from tinkerbell_server.commands import Sample
from tinkerbell_server.service.store import Finished

CLONE = 1_000_000_000
"""A clone of a sampling session numbers its requests from this many times its number."""


class Sampling:
    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def create_session(self, tenant: str, body: bytes) -> str:
        """create_sampling_session: its id."""
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
        """join_sampling_session: which clone this is, from 1."""
        sampler = self._requests.sampler(tenant, sampler_id)
        self._requests.store.put(msgspec.structs.replace(sampler, clones=sampler.clones + 1))
        return sampler.clones + 1

    def describe(self, tenant: str, sampler_id: str) -> dict[str, str]:
        """What GET /samplers/{id} answers."""
        sampler = self._requests.sampler(tenant, sampler_id)
        told = {"sampler_id": sampler.id, "base_model": sampler.base_model}
        return told if sampler.model_path is None else {**told, "model_path": sampler.model_path}

    async def sample(self, tenant: str, body: bytes) -> tuple[str, list[str]]:
        """asample: the request's id, and an id for each sequence it will have."""
        engine = await self._requests.engine()
        sent = protocol.parse(body, protocol.Sample)
        sampler = self._sampler(tenant, sent)
        key = f"{sampler.id}/{sent.seq_id if sent.seq_id is not None else f'at/{time.time_ns()}'}"
        request_id = self._requests.repeated(tenant, key, "sample", body)
        if request_id is None:
            command = decode_sample.sample_of(sent, engine)
            layout = decode_sample.layout_of(sent)
            request_id = self._requests.accept(tenant, "sample", key, body, parent=sampler.id, layout=layout)
            # samples of one network stand in one queue, so that they are drawn together
            queue = sampler.id if sampler.follows is not None else f"sampler:{sampler.folder or ''}"
            self._requests.queue(tenant, request_id, "sample", queue, lambda: self._now(command, sampler))
        return request_id, [f"{unqualified(request_id)}-{index}" for index in range(sent.num_samples)]

    # Any: JSON values of several types
    async def retrieve_futures(self, tenant: str, body: bytes, most: float) -> dict[str, Any]:
        """What has ended of a sampling session since its client asked last, waited for at most `most` seconds."""
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

    def _now(self, command: Sample, sampler: Sampler) -> Sample:
        """With the folder of the weights at this moment, which a follower changes."""
        folder = sampler.folder
        if sampler.follows is not None:
            run = self._requests.store.get(Run, sampler.follows)
            folder = folder if run is None else run.follower
        return msgspec.structs.replace(command, path=folder)


def _clone_of(key: str | None) -> int | None:
    """Which clone of its session sent a sample, by the seq_id at the end of its key."""
    seq = (key or "").rpartition("/")[2]
    return int(seq) // CLONE if seq.isdecimal() else None


# Any: JSON values of several types
def _completion(one: Finished) -> dict[str, Any]:
    if not one.done:
        return {"state": "failed", "request_id": unqualified(one.id)}
    size = {"response_payload_uncompressed_size": one.size}
    return {"state": "finished", "request_id": unqualified(one.id), **size}
