"""Logits as a loss sees them: stored, or computed chunk by chunk as the loss asks."""

from tinkerbell_core.logits.head import Head, Lora
from tinkerbell_core.logits.local import LocalSource
from tinkerbell_core.logits.plain import plain_logits
from tinkerbell_core.logits.source import LogitsSource, Reading
from tinkerbell_core.logits.tensor import Logits

__all__ = ["Head", "LocalSource", "Logits", "LogitsSource", "Lora", "Reading", "plain_logits"]
