"""Paths of saved models: which folder a save goes to, and which folder a load reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from tinkerbell_core.errors import BadCheckpoint, UnknownCheckpoint, did_you_mean
from tinkerbell_core.types import CreateModelRequest, SaveRequest
from tinkerbell_server.access.tenants import LOCAL, owner_of, unqualified
from tinkerbell_server.calls.settings import check_name
from tinkerbell_server.commands import Load, Save
from tinkerbell_server.database import make_folders
from tinkerbell_server.service.store import Store


def models_folder(data: Path, tenant: str) -> Path:
    """The root folder of everything that a tenant saves."""
    # not below the local models: a model may have the name of a tenant
    return data / "models" if tenant == LOCAL else data / "tenants" / tenant / "models"


class SaveByName(msgspec.Struct, frozen=True, kw_only=True):
    """A save to `folder/name`, which is created when the job runs. name None: `step-<steps of the model>`."""

    model_id: str
    folder: str
    name: str | None
    overwrite: bool = False
    optimizer: bool = True


class LoadByName(msgspec.Struct, frozen=True, kw_only=True):
    """A load of a save by its name, or by its absolute path, which is looked up when the job runs.

    anywhere: whether the path may be outside the tenant's folder.
    """

    model_id: str
    path: str
    optimizer: bool
    anywhere: bool


class SavePaths:
    """The folder `<model_id>/<name>` of each save, under one root for each tenant.

    anywhere: whether the caller may name a folder that is not under the root of its tenant.
    """

    def __init__(self, store: Store, data: Path) -> None:
        self._store, self._data = store, data

    def check_free(self, model_id: str, name: str | None) -> None:
        """Raise BadRequest for a malformed name, BadCheckpoint for a name that exists."""
        if name is None:
            return
        check_name("name", name)
        path = self._folder(model_id) / name
        if path.exists():
            raise BadCheckpoint(f"model {model_id!r} has a save {name!r} already ({path}); pass another name")

    def check_reference(self, spec: CreateModelRequest, *, anywhere: bool) -> CreateModelRequest:
        """The spec, with the absolute path of its reference if that is a folder.

        Raises UnknownCheckpoint for a reference that is neither 'base', 'initial' nor a folder.
        """
        if spec.reference in ("base", "initial"):
            return spec
        if not self._may_read(owner_of(spec.model_id), Path(spec.reference), anywhere):
            raise UnknownCheckpoint(f"reference is {spec.reference!r}, but must be 'base', 'initial' or a saved path")
        return msgspec.structs.replace(spec, reference=os.path.abspath(spec.reference))

    def save(self, request: SaveRequest) -> SaveByName:
        """The save that a request asks for. Raises what `check_free` raises."""
        self.check_free(request.model_id, request.name)
        return SaveByName(model_id=request.model_id, folder=str(self._folder(request.model_id)), name=request.name)

    def resolve(self, command: SaveByName | LoadByName) -> Save | Load:
        """The command for the engine, now that the jobs before it have ended.

        Raises BadCheckpoint if the folder of a save exists, UnknownCheckpoint if the folder of a load does not.
        """
        return self._save(command) if isinstance(command, SaveByName) else self._load(command)

    def _save(self, command: SaveByName) -> Save:
        model = self._store.model(command.model_id)
        path = Path(command.folder) / (command.name or f"step-{0 if model is None else model.steps}")
        if path.exists():
            if not command.overwrite:
                raise BadCheckpoint(
                    f"model {command.model_id!r} has a save {path.name!r} already ({path}); pass another name"
                )
            shutil.rmtree(path)
        make_folders(path.parent)
        return Save(model_id=command.model_id, path=str(path), optimizer=command.optimizer)

    def _load(self, command: LoadByName) -> Load:
        folder = self._folder(command.model_id)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        path = folder / command.path if command.path in names else Path(os.path.expanduser(command.path))
        if not path.is_absolute() or not self._may_read(owner_of(command.model_id), path, command.anywhere):
            saves = ", ".join(names) or "none"
            allowed = "a folder on the server" if command.anywhere else "a save of yours"
            raise UnknownCheckpoint(
                f"model {command.model_id!r} has no save {command.path!r}{did_you_mean(command.path, names)}, and it "
                f"is not the absolute path of {allowed} (its saves: {saves})"
            )
        return Load(model_id=command.model_id, path=str(path), optimizer=command.optimizer)

    def _folder(self, model_id: str) -> Path:
        return models_folder(self._data, owner_of(model_id)) / unqualified(model_id)

    def _may_read(self, tenant: str, path: Path, anywhere: bool) -> bool:
        """Whether the folder exists and this tenant may read it."""
        if not os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
            return False
        return anywhere or path.resolve().is_relative_to(models_folder(self._data, tenant).resolve())
