"""Resolves a loss by what somebody calls it: a name, an id, or `name@digest`."""

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


class Named(Protocol):
    """What a loss is found by: a LossSpec has it, and so has a LossDescription."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def digest(self) -> str: ...


N = TypeVar("N", bound=Named)


class LossRegistry:
    """Losses by id, in the order they came. Uploads keep their versions; a name means the latest."""

    def __init__(self, specs: Iterable[LossSpec] = ()) -> None:
        self._by_id: dict[str, LossSpec] = {}
        for spec in specs:
            self.add(spec)

    def add(self, spec: LossSpec) -> LossSpec:
        """Keep `spec` as the latest of its name. An upload, or a loss of this process, may come again.

        Raises AmbiguousLoss where a plugin has provided this id already.
        """
        known = self._by_id.get(spec.id)
        if known is not None and known.provenance.kind == "entry_point":
            raise AmbiguousLoss(f"{spec.id} is provided twice: rename one of the two losses")
        self._by_id.pop(spec.id, None)
        self._by_id[spec.id] = spec
        return spec

    def replace(self, spec: LossSpec) -> LossSpec:
        """Put `spec` where the loss of its id stands, its inputs discovered, say."""
        self._by_id[spec.id] = spec
        return spec

    def remove(self, id: str) -> None:
        """Forget a loss. Raises UnknownLoss."""
        if id not in self._by_id:
            raise UnknownLoss(f"no loss has the id {id!r}{did_you_mean(id, self._by_id)}")
        del self._by_id[id]

    def get(self, name: str) -> LossSpec:
        """The loss of a name, an id or `name@digest`. Raises UnknownLoss, AmbiguousLoss."""
        return resolve(name, list(self._by_id.values()))

    def check_upload_name(self, name: str) -> None:
        """Raise BadUpload where an upload may not have this name."""
        check_upload_name(name, [spec.name for spec in self if spec.provenance.kind == "entry_point"])

    def __iter__(self) -> Iterator[LossSpec]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, id: object) -> bool:
        return id in self._by_id


def resolve(name: str, losses: Sequence[N]) -> N:
    """The one of `losses` (oldest first) that `name` stands for. Raises UnknownLoss, AmbiguousLoss.

    Of uploads the last one is meant: a name's latest version, and of two owners' the one listed last.
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
            raise UnknownLoss(f"no version {name!r}; there is {versions}")
    else:
        found = [loss for loss in losses if name in (loss.name, loss.id.partition("@")[0])]
        uploads = [loss for loss in found if loss.id.startswith("upload:")]
        matching = [loss for loss in found if not loss.id.startswith("upload:")] + uploads[-1:]
    if not matching:
        known = sorted({loss.name for loss in losses})
        near = did_you_mean(base or name, [*known, *(loss.id for loss in losses)])
        raise UnknownLoss(f"no loss named {name!r}{near} (there is: {', '.join(known) or 'none'})")
    if len(matching) > 1:
        ids = " or ".join(sorted(loss.id for loss in matching))
        raise AmbiguousLoss(f"{name!r} is provided {len(matching)} times; ask for {ids}")
    return matching[0]


def _last_of_each(versions: list[N]) -> list[N]:
    """One loss a digest among uploads: the same version may be there from two owners."""
    uploads = {loss.digest: loss for loss in versions if loss.id.startswith("upload:")}
    return [loss for loss in versions if not loss.id.startswith("upload:")] + list(uploads.values())


def check_upload_name(name: str, taken: Iterable[str]) -> None:
    """Raise BadUpload where `name` is malformed or reads like one of `taken` (the plugins' names)."""
    if not re.fullmatch(r"[^\W\d][\w-]{0,63}", name):
        raise BadUpload(
            f"a loss cannot be named {name!r}: give it, with name=..., at most 64 letters, digits, '_' and '-'"
        )
    for reserved in [*taken, "custom"]:
        if _folded(name) == _folded(reserved):
            raise BadUpload(f"{name!r} is taken by the loss {reserved!r}: upload it under another name, with name=...")


def build_registry(
    found: Iterable[EntryPoint] | None = None, *, enabled: bool = True, disabled: Collection[str] = ()
) -> tuple[LossRegistry, list[PluginInfo]]:
    """The losses of all plugins, and what became of each plugin (`load_plugins` says what the arguments mean)."""
    registry = LossRegistry()
    infos = []
    for plugin in load_plugins(found, enabled=enabled, disabled=disabled):
        kept = []
        info = plugin
        for spec in plugin.losses:
            try:
                kept.append(registry.add(spec))
            except TinkerbellError as error:
                info = replace(info, error=error.message)
        infos.append(replace(info, losses=tuple(kept)))
    return registry, infos


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
