"""Where models are saved, and what a saved one is called. Knows paths, not what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from tinkerbell_core.errors import BadCheckpoint, UnknownCheckpoint, did_you_mean
from tinkerbell_core.types import CreateModelRequest, LoadRequest, SaveRequest
from tinkerbell_server.access.tenants import LOCAL, owner_of, unqualified
from tinkerbell_server.calls.settings import check_name
from tinkerbell_server.commands import Load, Save
from tinkerbell_server.service.store import Store


def models_folder(data: Path, tenant: str) -> Path:
    """The root of all that a tenant saves."""
    # a tenant's folder is beside the local models, not among them: a model may be called what a tenant is
    return data / "models" if tenant == LOCAL else data / "tenants" / tenant / "models"


class SavePaths:
    """The folder `<model_id>/<name>` of every save, under one root a tenant.

    anywhere, below: whether the caller may name a folder that is not under its tenant's root.
    """

    def __init__(self, store: Store, data: Path) -> None:
        self._store, self._data = store, data

    def check_free(self, model_id: str, name: str | None) -> None:
        """Raise BadRequest for a malformed name, BadCheckpoint for one that is taken."""
        if name is None:
            return
        check_name("name", name)
        path = self._folder(model_id) / name
        if path.exists():
            raise BadCheckpoint(f"model {model_id!r} has a save {name!r} already ({path}); pass another name")

    def check_reference(self, spec: CreateModelRequest, *, anywhere: bool) -> None:
        """Raise UnknownCheckpoint for a reference that is neither a word nor a folder."""
        if spec.reference in ("base", "initial"):
            return
        if not self._may_read(owner_of(spec.model_id), Path(spec.reference), anywhere):
            raise UnknownCheckpoint(f"reference is {spec.reference!r}, but must be 'base', 'initial' or a saved path")

    def save(self, request: SaveRequest) -> Save:
        """The command, for the step at which the model stands now."""
        model = self._store.model(request.model_id)
        name = request.name or f"step-{0 if model is None else model.steps}"
        self.check_free(request.model_id, name)
        path = self._folder(request.model_id) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return Save(model_id=request.model_id, path=str(path))

    def load(self, request: LoadRequest, *, anywhere: bool) -> Load:
        """The command, for a name this model was saved under or a path. Raises UnknownCheckpoint for no such folder."""
        folder = self._folder(request.model_id)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        path = folder / request.path if request.path in names else Path(os.path.expanduser(request.path))
        if not path.is_absolute() or not self._may_read(owner_of(request.model_id), path, anywhere):
            saves = ", ".join(names) or "none"
            where = "a folder on the server" if anywhere else "a save of yours"
            raise UnknownCheckpoint(
                f"model {request.model_id!r} has no save {request.path!r}{did_you_mean(request.path, names)}, and it "
                f"is no absolute path of {where} (its saves: {saves})"
            )
        return Load(model_id=request.model_id, path=str(path), optimizer=request.optimizer)

    def _folder(self, model_id: str) -> Path:
        return models_folder(self._data, owner_of(model_id)) / unqualified(model_id)

    def _may_read(self, tenant: str, path: Path, anywhere: bool) -> bool:
        """Whether there is such a folder, as far as this tenant is concerned."""
        if not os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
            return False
        return anywhere or path.resolve().is_relative_to(models_folder(self._data, tenant).resolve())
