"""Where models are saved, and what a saved one is called. Knows paths, not what is in them."""

from __future__ import annotations

from pathlib import Path

from tinkerbell_core.errors import BadCheckpoint, did_you_mean
from tinkerbell_core.types import CreateModelRequest, LoadRequest, SaveRequest
from tinkerbell_server.engines.base import Load, Save
from tinkerbell_server.ranges import check_name
from tinkerbell_server.store import Store


class Saves:
    """The folder `<model_id>/<name>` of every save, under one root."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store, self._root = store, root

    def check_free(self, model_id: str, name: str | None) -> None:
        """Raise BadRequest for a malformed name, BadCheckpoint for one that is taken."""
        if name is None:
            return
        check_name("name", name)
        path = self._root / model_id / name
        if path.exists():
            raise BadCheckpoint(f"model {model_id!r} has a save {name!r} already ({path}); pass another name")

    def check_reference(self, spec: CreateModelRequest) -> None:
        """Raise BadCheckpoint for a reference that is neither a word nor a folder."""
        if spec.reference not in ("base", "initial") and not Path(spec.reference).is_dir():
            raise BadCheckpoint(f"reference is {spec.reference!r}, but must be 'base', 'initial' or a saved path")

    def save(self, request: SaveRequest) -> Save:
        """The command, for the step at which the model stands now."""
        model = self._store.model(request.model_id)
        name = request.name or f"step-{0 if model is None else model.steps}"
        self.check_free(request.model_id, name)
        path = self._root / request.model_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return Save(model_id=request.model_id, path=str(path))

    def load(self, request: LoadRequest) -> Load:
        """The command, for a name this model was saved under or a path. Raises BadCheckpoint for no such folder."""
        folder = self._root / request.model_id
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        path = folder / request.path if request.path in names else Path(request.path).expanduser()
        if not path.is_absolute() or not path.is_dir():
            saves = ", ".join(names) or "none"
            raise BadCheckpoint(
                f"model {request.model_id!r} has no save {request.path!r}{did_you_mean(request.path, names)}, and it "
                f"is no absolute path of a folder on the server (its saves: {saves})"
            )
        return Load(model_id=request.model_id, path=str(path), optimizer=request.optimizer)
