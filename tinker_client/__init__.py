"""The Python client: `TinkerClient`, and the `custom_loss` decorator. It imports neither the server nor torch."""

from tinker_client.backend import HFBackend
from tinker_client.client import TinkerClient
from tinker_client.futures import TrainingFuture
from tinker_client.losses import custom_loss
from tinker_client.results import ForwardBackwardResult, Preview
from tinkerbell_core.output import LossFnOutput

__all__ = [
    "ForwardBackwardResult",
    "HFBackend",
    "LossFnOutput",
    "Preview",
    "TinkerClient",
    "TrainingFuture",
    "custom_loss",
]
