"""The logits that a loss gets: stored, or lazy and computed in chunks when the loss reads them."""

from tinkerbell_core.logits.head import Head, Lora
from tinkerbell_core.logits.lazy.tensor import Logits
from tinkerbell_core.logits.local.source import LocalSource
from tinkerbell_core.logits.plain import plain_logits
from tinkerbell_core.logits.source import LogitsSource, Reading

__all__ = ["Head", "LocalSource", "Logits", "LogitsSource", "Lora", "Reading", "plain_logits"]
