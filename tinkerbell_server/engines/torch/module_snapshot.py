"""Restores the structure of a network exactly when a change to it fails halfway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Set the modules of a model back after an exception: which they are, their attributes, what requires a gradient.

    The numbers in the parameters are not copied, because adding an adapter does not change them.
    """
    before = {module: _Attributes(module) for module in model.modules()}
    config = getattr(model, "config", None)
    settings = _Attributes(config) if hasattr(config, "__dict__") else None
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes in before.values():
            attributes.restore()
        if settings is not None:
            settings.restore()
        for parameter, required in gradients:
            parameter.requires_grad_(required)
        raise


class _Attributes:
    """The attributes of an object, and a copy of each one that is a collection, one level deep."""

    def __init__(self, owner: Any) -> None:  # Any: a module or a config
        self._namespace: dict[str, Any] = vars(owner)
        self._values = dict(self._namespace)
        self._contents = {
            name: value.copy() for name, value in self._values.items() if isinstance(value, dict | list | set)
        }

    def restore(self) -> None:
        """Set the attributes to these objects, with their content of that time."""
        self._namespace.clear()
        self._namespace.update(self._values)
        for name, content in self._contents.items():
            current = self._values[name]
            current.clear()
            if isinstance(current, list):
                current.extend(content)
            else:
                current.update(content)
