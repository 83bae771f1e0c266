"""Everything a server has for clients of the Tinker and OpenAI wires, made once and closed once."""

from __future__ import annotations

import asyncio

from tinkerbell_server.completions import Completions
from tinkerbell_server.service import Service
from tinkerbell_server.tinker.checkpoints import Checkpoints
from tinkerbell_server.tinker.copies import Copies
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.downloads import Downloads
from tinkerbell_server.tinker.lines import Lines
from tinkerbell_server.tinker.listing import Listing
from tinkerbell_server.tinker.losses import CustomLosses
from tinkerbell_server.tinker.sampling import Sampling
from tinkerbell_server.tinker.sessions import Sessions
from tinkerbell_server.tinker.training import Training
from tinkerbell_server.tinker.upkeep import Upkeep


class Front:
    def __init__(self, service: Service) -> None:
        self.desk = Desk(service)
        self.sessions = Sessions(self.desk)
        self.losses = CustomLosses(self.desk)
        self.lines = Lines(self.desk)
        self.training = Training(self.desk, self.lines, self.losses)
        self.checkpoints = Checkpoints(self.desk, self.lines)
        self.copies = Copies(self.desk, self.checkpoints)
        self.sampling = Sampling(self.desk, self.checkpoints)
        self.completions = Completions(self.desk, self.checkpoints)
        self.listing = Listing(self.desk, self.checkpoints)
        self.downloads = Downloads()
        self.upkeep = Upkeep(self.desk, self.listing, self.losses)
        self._upkeep: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._upkeep = asyncio.create_task(self.upkeep.run())

    def close(self) -> None:
        if self._upkeep is not None:
            self._upkeep.cancel()
        self.lines.close()
        self.desk.records.close()
