"""The inputs of a loss in a call, with a record of those that the loss reads."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class RecordedInputs(dict[str, Tensor]):
    """A dict whose `read` contains the keys that were asked for, also with `get` and `in`.

    Who iterates over the dict, or copies it, reads every key.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(inputs)
        self.read: set[str] = set()

    def unrecorded(self) -> dict[str, Tensor]:
        """The same inputs, as a dict that records nothing."""
        return {name: super(RecordedInputs, self).__getitem__(name) for name in super().__iter__()}

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            self.read.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:  # Any: as in dict
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:  # Any: as in dict
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        self._read_all()
        return super().__iter__()

    def keys(self) -> Any:  # Any: the type of dict.keys cannot be written
        self._read_all()
        return super().keys()

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]  # dict_values is one
        self._read_all()
        return super().values()

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]  # dict_items is one
        self._read_all()
        return super().items()

    def _read_all(self) -> None:
        self.read.update(super().__iter__())
