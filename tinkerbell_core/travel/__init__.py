"""A loss as source text and values: readable, of no Python version in particular, rebuilt anywhere. Never a pickle."""

from tinkerbell_core.travel.packing import pack
from tinkerbell_core.travel.rebuilding import rebuild

__all__ = ["pack", "rebuild"]
