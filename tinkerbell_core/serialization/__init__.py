"""A loss as source text and values: readable, of no Python version in particular, rebuilt anywhere. Never a pickle."""

from tinkerbell_core.serialization.pack import pack
from tinkerbell_core.serialization.unpack import unpack

__all__ = ["pack", "unpack"]
