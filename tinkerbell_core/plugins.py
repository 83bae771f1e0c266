"""Finds installed plugins and loads each on its own; a broken one is reported and never stops the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

import pluggy

from tinkerbell_core import hookspecs
from tinkerbell_core.errors import BadLoss, TinkerbellError
from tinkerbell_core.spec import LossSpec, Provenance
from tinkerbell_core.types import PluginDescription

GROUP = "tinkerbell"

BUILT_IN = "tinkerbell-core"
"""The distribution whose entry points are the built-in losses; these are loaded even if plugins are disabled."""

hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One entry point: its origin, its losses, and the reason if it is broken."""

    name: str
    distribution: str
    version: str
    losses: tuple[LossSpec, ...] = ()
    error: str | None = None

    @property
    def id(self) -> str:
        return f"{self.distribution}:{self.name}"

    def broken(self, error: BaseException) -> PluginInfo:
        """This plugin without losses, broken because of `error`."""
        reason = error.message if isinstance(error, TinkerbellError) else f"{type(error).__name__}: {error}"
        return replace(self, losses=(), error=reason)

    def describe(self) -> PluginDescription:
        return PluginDescription(
            id=self.id,
            distribution=self.distribution,
            version=self.version,
            losses=tuple(spec.id for spec in self.losses),
            error=self.error,
        )


def load_plugins(
    found: Iterable[EntryPoint] | None = None, *, enabled: bool = True, disabled: Collection[str] = ()
) -> list[PluginInfo]:
    """Load every entry point of group "tinkerbell" (or of `found`), sorted by distribution and name.

    enabled=False: load the built-in losses only. disabled: ids (`distribution:entry-point`) or distributions to skip.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    infos = {}
    for entry_point in sorted(entry_points(group=GROUP) if found is None else found, key=_order):
        info = _describe(entry_point)
        if info.id in disabled or info.distribution in disabled or not (enabled or info.distribution == BUILT_IN):
            continue
        if info.id in infos:  # the same distribution is on sys.path twice
            continue
        infos[info.id] = _load(manager, entry_point, info)
    for impl in manager.hook.register_losses.get_hookimpls():
        infos[impl.plugin_name] = _collect(impl, infos[impl.plugin_name])
    return list(infos.values())


def _load(manager: pluggy.PluginManager, entry_point: EntryPoint, info: PluginInfo) -> PluginInfo:
    try:
        manager.register(entry_point.load(), name=info.id)
        manager.check_pending()
    # Broad: a plugin is third-party code and may raise anything at import, even SystemExit.
    except (Exception, SystemExit) as error:
        if manager.has_plugin(info.id):
            manager.unregister(name=info.id)
        return info.broken(error)
    return info


def _collect(impl: pluggy.HookImpl, info: PluginInfo) -> PluginInfo:
    provenance = Provenance("entry_point", info.distribution, info.version)
    losses = []
    try:
        for spec in impl.function():  # type: ignore[attr-defined]  # pluggy declares it as object
            if not isinstance(spec, LossSpec):
                raise BadLoss(f"register_losses() returned {spec!r}, which is not a loss: decorate it with @loss")
            losses.append(spec.from_(provenance))
    # Broad: as above; the hook runs code of the plugin.
    except (Exception, SystemExit) as error:
        return info.broken(error)
    return replace(info, losses=tuple(losses))


def _order(entry_point: EntryPoint) -> tuple[str, str]:
    return (entry_point.dist.name if entry_point.dist else "", entry_point.name)


def _describe(entry_point: EntryPoint) -> PluginInfo:
    dist = entry_point.dist
    if dist is None:
        return PluginInfo(entry_point.name, "unknown", "")
    return PluginInfo(entry_point.name, dist.name, dist.version)
