"""The hooks that a plugin may implement. A hook returns values; it does not register them by side effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from tinkerbell_core.spec import LossSpec

hookspec = pluggy.HookspecMarker("tinkerbell")


@hookspec
def register_losses() -> Iterable[LossSpec]:  # type: ignore[empty-body]  # a hookspec has no body
    """Return the losses of this plugin, each created with `@loss`."""
