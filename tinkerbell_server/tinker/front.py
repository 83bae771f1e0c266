"""Everything a server has for Tinker clients, made once and closed once."""

from __future__ import annotations

from tinkerbell_server.service import Service
from tinkerbell_server.tinker.checkpoints import Checkpoints
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.sampling import Sampling
from tinkerbell_server.tinker.sessions import Sessions
from tinkerbell_server.tinker.training import Training


class Front:
    def __init__(self, service: Service) -> None:
        self.desk = Desk(service)
        self.sessions = Sessions(self.desk)
        self.training = Training(self.desk)
        self.checkpoints = Checkpoints(self.desk, self.training)
        self.sampling = Sampling(self.desk, self.checkpoints)

    def close(self) -> None:
        self.training.close()
        self.desk.records.close()
