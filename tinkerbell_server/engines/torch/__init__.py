"""The engine that computes with PyTorch. Importing this package does not import torch; its modules do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinkerbell_server.calls.templates import Tokenizer
    from tinkerbell_server.config import Settings
    from tinkerbell_server.engines.torch.engine import TorchEngine


def create_engine(settings: Settings) -> TorchEngine:
    """Load the base model, its tokenizer and the losses. Raises BadRequest if one of them cannot be loaded."""
    from tinkerbell_server.engines.torch.engine import TorchEngine

    return TorchEngine(settings)


def load_tokenizer(settings: Settings) -> Tokenizer:
    """Load the tokenizer of the base model, without the model. Raises BadRequest if it cannot be loaded."""
    from tinkerbell_server.engines.torch import tokenizer
    from tinkerbell_server.engines.torch.tiny_model import embedded_model

    source = settings.model or embedded_model(settings.data_path)
    loaded: Tokenizer = tokenizer.load_tokenizer(
        source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    return loaded
