"""The losses of one engine: those of the installed plugins, uploaded ones, and those imported by a dotted path."""

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
from tinkerbell_server.calls.local_losses import import_loss
from tinkerbell_server.engines.torch.uploaded_losses import UploadedLosses
from tinkerbell_server.sandbox.losses import RunContext, in_context


class Losses:
    """Every loss has passed a dry run. A plugin's loss that fails it is left out, and `plugins` gives the reason."""

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
        """enabled, disabled: of `load_plugins`. dotted_losses: whether `imported` may import modules."""
        self._dotted = dotted_losses
        self._uploads = uploads
        self._vocab_size = vocab_size
        self._device = device
        self._registry, found = build_registry(enabled=enabled, disabled=disabled)
        reasons = {}
        for spec in self._registry:
            try:
                self._registry.replace(dry_run(spec, vocab_size, device))
            except TinkerbellError as error:
                reasons[spec.id] = error.message
                self._registry.remove(spec.id)
        self.plugins = [_without_failed(info.describe(), reasons) for info in found]

    def check_required(self, names: Collection[str]) -> None:
        """Raise BadRequest if one of these plugins or distributions is not installed, or is broken."""
        for name in names:
            required = [plugin for plugin in self.plugins if name in (plugin.id, plugin.distribution)]
            if not required:
                known = [plugin.id for plugin in self.plugins]
                raise BadRequest(
                    f"required plugin {name!r} is not installed, or is disabled{did_you_mean(name, known)}"
                )
            for plugin in required:
                if plugin.error:
                    raise BadRequest(f"required plugin {plugin.id!r} is broken: {plugin.error}")

    def get(self, name: str, context: RunContext | None = None) -> LossSpec:
        """The loss of an id or a name; a loss in the sandbox is bound to the context.

        Raises UnknownLoss, AmbiguousLoss.
        """
        spec = self._registry.get(name)
        if context is None or spec.provenance.kind != "upload":
            return spec
        return in_context(spec, context)

    def sum(self, weights: Mapping[str, float], context: RunContext | None = None) -> LossSpec:
        """The weighted sum of the losses of these ids, each as `get` returns it. Raises UnknownLoss, BadLoss."""
        return combine([(self.get(id, context), weight) for id, weight in weights.items()])

    def descriptions(self) -> list[LossDescription]:
        return [LossDescription.of(spec) for spec in self._registry]

    def upload(self, upload: RegisterLossRequest, owner: str | None = None) -> LossSpec:
        """Add an uploaded loss of a tenant. Raises UploadsOff, BadUpload, BadLoss, and then adds nothing."""
        self._registry.check_upload_name(upload.name)
        if self._uploads is None:
            raise UploadsOff("this engine accepts no uploaded losses")
        spec = self._uploads.spec(upload, self._vocab_size, self._device)
        return self._registry.add(spec.from_(Provenance("upload", owner=owner)))

    def imported(self, path: str) -> LossSpec:
        """The loss of a dotted path, imported if it is not there yet.

        Raises BadRequest if this engine imports none, UnknownLoss, BadLoss.
        """
        if not self._dotted:
            raise BadRequest("this engine imports no losses by dotted path")
        known = [spec for spec in self._registry if spec.name == path]
        if known:
            return known[0]
        spec = replace(import_loss(path), name=path).from_(Provenance())
        return self._registry.add(dry_run(spec, self._vocab_size, self._device))

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Remove uploaded losses; the ids of those that existed."""
        existing = [id for id in ids if id in self._registry]
        for id in existing:
            if self._uploads is not None:
                self._uploads.forget(self._registry.get(id))
            self._registry.remove(id)
        return existing


def _without_failed(plugin: PluginDescription, reasons: Mapping[str, str]) -> PluginDescription:
    """The plugin without the losses that failed. reasons: why, by the id of the loss."""
    errors = [reasons[id] for id in plugin.losses if id in reasons]
    if not errors:
        return plugin
    losses = tuple(id for id in plugin.losses if id not in reasons)
    return msgspec.structs.replace(plugin, losses=losses, error="; ".join(errors))
