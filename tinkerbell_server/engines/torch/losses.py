"""The losses of one engine: those of its plugins, each tried once, and those uploaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import msgspec
import torch

from tinkerbell_core.compose import combine
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadRequest, TinkerbellError, UploadsOff, did_you_mean
from tinkerbell_core.registry import build_registry
from tinkerbell_core.spec import LossSpec, Provenance
from tinkerbell_core.types import LossDescription, PluginDescription, RegisterLossRequest
from tinkerbell_server.calls.local_losses import dotted
from tinkerbell_server.engines.torch.uploaded_losses import UploadedLosses
from tinkerbell_server.sandbox.losses import RunContext, in_context


class Losses:
    """A loss that fails its trial is not listed; its plugin is, with the reason."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        uploads: UploadedLosses | None = None,
        *,
        enabled: bool = True,
        disabled: Collection[str] = (),
        dotted_losses: bool = False,
    ) -> None:
        self._dotted = dotted_losses
        self._uploads = uploads
        self._vocab_size = vocab_size
        self._device = device
        self._registry, found = build_registry(enabled=enabled, disabled=disabled)
        failed = {}
        for spec in self._registry:
            try:
                self._registry.replace(dry_run(spec, vocab_size, device))
            except TinkerbellError as error:
                failed[spec.id] = error.message
                self._registry.remove(spec.id)
        self.plugins = [_without(info.describe(), failed) for info in found]

    def check_required(self, names: Collection[str]) -> None:
        """Raise BadRequest for a plugin or distribution that is not here, or not whole."""
        for name in names:
            named = [plugin for plugin in self.plugins if name in (plugin.id, plugin.distribution)]
            if not named:
                known = [plugin.id for plugin in self.plugins]
                raise BadRequest(
                    f"required plugin {name!r} is not installed, or is left out{did_you_mean(name, known)}"
                )
            for plugin in named:
                if plugin.error:
                    raise BadRequest(f"required plugin {plugin.id!r} is broken: {plugin.error}")

    def get(self, name: str, context: RunContext | None = None) -> LossSpec:
        """The loss of a name, bound to a context if it runs in the sandbox. Raises UnknownLoss, AmbiguousLoss."""
        spec = self._registry.get(name)
        return spec if context is None else in_context(spec, context)

    def sum(self, weights: Mapping[str, float], context: RunContext | None = None) -> LossSpec:
        """The weighted sum of the losses of these ids, each bound to the context. Raises UnknownLoss, BadLoss."""
        return combine([(self.get(id, context), weight) for id, weight in weights.items()])

    def descriptions(self) -> list[LossDescription]:
        return [LossDescription.of(spec) for spec in self._registry]

    def upload(self, upload: RegisterLossRequest, owner: str | None = None) -> LossSpec:
        """Raises BadUpload, BadLoss; then nothing was kept."""
        self._registry.check_upload_name(upload.name)
        if self._uploads is None:
            raise UploadsOff("these losses take no uploads")
        spec = self._uploads.spec(upload, self._vocab_size, self._device)
        return self._registry.add(spec.from_(Provenance("upload", owner=owner)))

    def imported(self, name: str) -> LossSpec:
        """The loss of a dotted path, kept from now on. Raises BadRequest where that is off, UnknownLoss, BadLoss."""
        if not self._dotted:
            raise BadRequest("this engine imports no losses by dotted path")
        known = [spec for spec in self._registry if spec.name == name]
        if known:
            return known[0]
        spec = replace(dotted(name), name=name).from_(Provenance())
        return self._registry.add(dry_run(spec, self._vocab_size, self._device))

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Forget uploads; the ids of those that were there."""
        there = [id for id in ids if id in self._registry]
        for id in there:
            if self._uploads is not None:
                self._uploads.forget(self._registry.get(id))
            self._registry.remove(id)
        return there


def _without(plugin: PluginDescription, failed: dict[str, str]) -> PluginDescription:
    reasons = [failed[id] for id in plugin.losses if id in failed]
    if not reasons:
        return plugin
    kept = tuple(id for id in plugin.losses if id not in failed)
    return msgspec.structs.replace(plugin, losses=kept, error="; ".join(reasons))
