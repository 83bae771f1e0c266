"""A loss as source text and captured values, which every Python version can read. This package does not use pickle."""

from tinkerbell_core.serialization.pack import pack
from tinkerbell_core.serialization.unpack import unpack

__all__ = ["pack", "unpack"]
