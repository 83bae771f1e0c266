"""The public names for authors of losses. Importing this package does not import torch."""

from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.plugins import hookimpl
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec

__version__ = "0.2.0"

__all__ = ["LossFnOutput", "LossRegistry", "LossSpec", "TinkerbellError", "__version__", "hookimpl", "loss"]
