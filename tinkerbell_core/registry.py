"""Finds a loss by a name, an id, or `name@digest`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Protocol, TypeVar

from tinkerbell_core.errors import AmbiguousLoss, BadUpload, TinkerbellError, UnknownLoss, did_you_mean
from tinkerbell_core.plugins import PluginInfo, load_plugins
from tinkerbell_core.spec import LossSpec

DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""The form `my.module:function`; the groups are the module and the function."""


class Named(Protocol):
    """The fields by which a loss is found: those of LossSpec and of LossDescription."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def digest(self) -> str: ...


N = TypeVar("N", bound=Named)


class LossRegistry:
    """Losses by id, in the order in which they were added. Uploads keep all versions; a name means the latest."""

    def __init__(self, specs: Iterable[LossSpec] = ()) -> None:
        self._by_id: dict[str, LossSpec] = {}
        for spec in specs:
            self.add(spec)

    def add(self, spec: LossSpec) -> LossSpec:
        """Add `spec` as the latest loss of its name. It replaces an upload or a local loss with the same id.

        Raises AmbiguousLoss if a plugin already provides this id.
        """
        existing = self._by_id.get(spec.id)
        if existing is not None and existing.provenance.kind == "entry_point":
            raise AmbiguousLoss(f"{spec.id} is provided twice: rename one of the two losses")
        self._by_id.pop(spec.id, None)
        self._by_id[spec.id] = spec
        return spec

    def replace(self, spec: LossSpec) -> LossSpec:
        """Replace the loss of the same id and keep its position, for example once its inputs are discovered."""
        self._by_id[spec.id] = spec
        return spec

    def remove(self, id: str) -> None:
        """Remove a loss. Raises UnknownLoss."""
        if id not in self._by_id:
            raise UnknownLoss(f"no loss has the id {id!r}{did_you_mean(id, self._by_id)}")
        del self._by_id[id]

    def get(self, name: str) -> LossSpec:
        """The loss with this name, id or `name@digest`. Raises UnknownLoss or AmbiguousLoss."""
        exact = self._by_id.get(name)
        return resolve(name, list(self._by_id.values())) if exact is None else exact

    def check_upload_name(self, name: str) -> None:
        """Raise BadUpload if an upload may not have this name."""
        check_upload_name(name, [spec.name for spec in self if spec.provenance.kind == "entry_point"])

    def __iter__(self) -> Iterator[LossSpec]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, id: object) -> bool:
        return id in self._by_id


def is_dotted(name: str) -> bool:
    """Whether a name has the form `my.module:function`."""
    return DOTTED.fullmatch(name) is not None


def resolve(name: str, losses: Sequence[N]) -> N:
    """The loss among `losses` (oldest first) with this name, id or `name@digest`.

    Among uploads of one name, the last one is chosen. Raises UnknownLoss or AmbiguousLoss.
    """
    for loss in reversed(losses):
        if loss.id == name:
            return loss
    base, _, prefix = name.rpartition("@")
    if base:
        found = [loss for loss in losses if base in (loss.name, loss.id.partition("@")[0])]
        matching = _last_of_each([loss for loss in found if prefix and loss.digest.startswith(prefix)])
        if found and not matching:
            versions = ", ".join(f"{base}@{loss.digest[:12]}" for loss in found)
            raise UnknownLoss(f"no version {name!r}; available: {versions}")
    else:
        found = [loss for loss in losses if name in (loss.name, loss.id.partition("@")[0])]
        uploads = [loss for loss in found if loss.id.startswith("upload:")]
        matching = [loss for loss in found if not loss.id.startswith("upload:")] + uploads[-1:]
    if not matching:
        known = sorted({loss.name for loss in losses})
        near = did_you_mean(base or name, [*known, *(loss.id for loss in losses)])
        raise UnknownLoss(f"no loss named {name!r}{near} (available: {', '.join(known) or 'none'})")
    if len(matching) > 1:
        ids = " or ".join(sorted(loss.id for loss in matching))
        raise AmbiguousLoss(f"{len(matching)} losses are named {name!r}; use the id {ids}")
    return matching[0]


def _last_of_each(versions: list[N]) -> list[N]:
    """The losses with one upload per digest: two owners may have uploaded the same version."""
    uploads = {loss.digest: loss for loss in versions if loss.id.startswith("upload:")}
    return [loss for loss in versions if not loss.id.startswith("upload:")] + list(uploads.values())


def check_upload_name(name: str, taken: Iterable[str]) -> None:
    """Raise BadUpload if `name` is malformed or looks like one of `taken` (the names of plugin losses)."""
    if not re.fullmatch(r"[^\W\d][\w-]{0,63}", name):
        raise BadUpload(f"a loss cannot be named {name!r}: pass name=..., at most 64 letters, digits, '_' and '-'")
    for reserved in [*taken, "custom"]:
        if _folded(name) == _folded(reserved):
            raise BadUpload(f"the name {name!r} is taken by the loss {reserved!r}: pass another name=...")


def build_registry(
    found: Iterable[EntryPoint] | None = None, *, enabled: bool = True, disabled: Collection[str] = ()
) -> tuple[LossRegistry, list[PluginInfo]]:
    """The losses of all plugins, and the state of each plugin. The arguments are those of `load_plugins`."""
    registry = LossRegistry()
    infos = []
    for plugin in load_plugins(found, enabled=enabled, disabled=disabled):
        added = []
        info = plugin
        for spec in plugin.losses:
            try:
                added.append(registry.add(spec))
            except TinkerbellError as error:
                info = replace(info, error=error.message)
        infos.append(replace(info, losses=tuple(added)))
    return registry, infos


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
