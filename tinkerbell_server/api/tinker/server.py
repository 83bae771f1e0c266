"""The parts of the Tinker API: created with the server, and closed with it."""

from __future__ import annotations

import asyncio

from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.custom_losses import CustomLosses
from tinkerbell_server.api.tinker.queries import Queries
from tinkerbell_server.api.tinker.reaper import Reaper
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.sampling import Sampling
from tinkerbell_server.api.tinker.sequencer import Sequencer
from tinkerbell_server.api.tinker.sessions import Sessions
from tinkerbell_server.api.tinker.training import Training
from tinkerbell_server.api.tinker.transfer import CheckpointCopies, DownloadLinks
from tinkerbell_server.service.service import Service


class TinkerServer:
    def __init__(self, service: Service) -> None:
        self.requests = TinkerRequests(service)
        self.sessions = Sessions(self.requests)
        self.losses = CustomLosses(self.requests)
        self.sequencer = Sequencer(self.requests)
        self.training = Training(self.requests, self.sequencer, self.losses)
        self.checkpoints = Checkpoints(self.requests, self.sequencer)
        self.copies = CheckpointCopies(self.requests, self.checkpoints)
        self.sampling = Sampling(self.requests, self.checkpoints)
        self.queries = Queries(self.requests, self.checkpoints)
        self.downloads = DownloadLinks()
        self.reaper = Reaper(self.requests, self.queries, self.losses)
        self._reaper_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reaper_task = asyncio.create_task(self.reaper.run())

    def close(self) -> None:
        if self._reaper_task is not None:
            self._reaper_task.cancel()
        self.sequencer.close()
        self.requests.store.close()
