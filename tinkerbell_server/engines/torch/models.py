"""The trained models of one engine by id: creates, loads, deletes and activates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import torch

from tinkerbell_core.errors import BadCheckpoint, BadRequest, UnknownModel, did_you_mean
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.engines.torch import checkpoints
from tinkerbell_server.engines.torch.adapters import Adapters
from tinkerbell_server.engines.torch.checkpoints import Checkpoint
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.restore import check_moments, restore_moments, restore_weights
from tinkerbell_server.engines.torch.trained_model import TrainedModel

SNAPSHOTS = 8
"""The number of saved folders that stay loaded after samples were drawn from them."""

LoadNetwork = Callable[[str | Path, torch.dtype], Network]


class Models:
    """One base network, and any number of models on it: adapters on the base, and full copies of it.

    load_network: loads a folder or hub id with the settings of this engine.
    """

    def __init__(self, base: Network, load_network: LoadNetwork, data_folder: Path) -> None:
        self.base = base
        self.data_folder = data_folder
        self.adapters = Adapters(base)
        self._load_network = load_network
        self._by_id: dict[str, TrainedModel] = {}
        # by path: the network of a full model, or the name of an adapter on the base
        self._references: dict[str, Network | str] = {}
        # the same by path and time of change, the most recently used last
        self._snapshots: dict[tuple[Path, int], Network | str] = {}
        # the number of calls that draw samples from them now
        self._in_use: Counter[tuple[Path, int]] = Counter()

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._by_id

    def get(self, model_id: str) -> TrainedModel:
        """Raises UnknownModel."""
        if model_id not in self._by_id:
            known = ", ".join(self._by_id) or "none"
            raise UnknownModel(f"no model {model_id!r}{did_you_mean(model_id, self._by_id)} (available: {known})")
        return self._by_id[model_id]

    def get_or_create(self, model_id: str, spec: CreateModelRequest | None) -> tuple[TrainedModel, bool]:
        """The model of this id, and whether it was created now. Raises UnknownModel if it is missing without a spec."""
        if model_id in self._by_id or spec is None:
            return self.get(model_id), False
        return self.create(spec), True

    def create(self, spec: CreateModelRequest) -> TrainedModel:
        """Raises BadRequest if the id exists, BadHyperparameter for the adapter, BadCheckpoint for the reference."""
        if spec.model_id in self._by_id:
            raise BadRequest(f"model {spec.model_id!r} exists already: delete it, or use another id")
        if spec.reference not in ("base", "initial"):
            checkpoints.check_base(checkpoints.read(Path(spec.reference)), self.base)
        if spec.full or spec.rank is None:
            network = self._full_copy(self.base.source)
            model = TrainedModel.new(spec, network, None, dict(network.model.named_parameters()))
        else:
            name = self.adapters.add(self.adapters.config_of(spec), spec.seed)
            model = TrainedModel.new(spec, self.base, name, self.adapters.parameters(name))
        self._by_id[spec.model_id] = model
        return model

    def delete(self, model_id: str) -> TrainedModel:
        """Raises UnknownModel."""
        model = self.get(model_id)
        if model.adapter is not None:
            self.adapters.delete(model.adapter)
        del self._by_id[model_id]
        return model

    def load(self, model: TrainedModel, path: Path, *, optimizer: bool) -> bool:
        """Replace a model's weights by a checkpoint's; whether the optimizer's state was restored too.

        An adapter takes the rank and the target modules of the checkpoint. Raises BadCheckpoint, and then the model
        has not changed.
        """
        checkpoint = checkpoints.read(path)
        if (checkpoint.config is None) != (model.adapter is None):
            saved = "a full model" if checkpoint.config is None else "an adapter"
            current = "an adapter" if model.adapter else "a full model"
            raise BadCheckpoint(
                f"{path} contains {saved}, but model {model.id!r} is {current}: create a model of the same kind"
            )
        checkpoints.check_base(checkpoint, self.base)
        with_moments = optimizer and checkpoint.moments is not None
        loaded = self._loaded(model, checkpoint, with_moments)
        state = checkpoint.state
        loaded.steps, loaded.calls = (state.step, state.calls) if state is not None else (0, 0)
        loaded.initial = checkpoints.initial_of(state, self.data_folder) if state and with_moments else str(path)
        if state is not None:
            loaded.saved_path, loaded.saved_step = str(path), state.step
        self._by_id[model.id] = loaded
        if model.adapter is not None:
            self.adapters.delete(model.adapter)
        return with_moments

    def activate(self, model: TrainedModel | None) -> Network:
        """The network of a model, with its adapter active; None for the base without an adapter."""
        if model is None or model.adapter is not None:
            self.adapters.use(model.adapter if model is not None else None)
        return model.network if model is not None else self.base

    def reference(self, name: str) -> Network:
        """The activated network of a reference: "base" or a path. It stays loaded. Raises BadCheckpoint."""
        if name == "base":
            return self.activate(None)
        if name not in self._references:
            self._references[name] = self._load_saved(Path(name))
        return self._activate_saved(self._references[name])

    @contextmanager
    def for_samples(self, path: Path | None, model_id: str | None) -> Iterator[Callable[[], Network]]:
        """A function that activates a saved folder, a model, or without both the base, and returns its network.

        What it activates stays loaded until the end of the block; of other saved folders, the last few do. Raises
        UnknownModel, BadCheckpoint.
        """
        if path is None:
            yield partial(self.activate, None if model_id is None else self.get(model_id))
            return
        key = path, path.stat().st_mtime_ns if path.is_dir() else 0
        saved = self._snapshots.pop(key, None)
        if saved is None:
            saved = self._load_saved(path)
        self._snapshots[key] = saved
        self._in_use[key] += 1
        try:
            self._unload_snapshots()
            yield partial(self._activate_saved, saved)
        finally:
            self._in_use[key] -= 1

    def _unload_snapshots(self) -> None:
        """Unload the saved folders that were used longest ago and from which no samples are drawn now."""
        idle = [key for key in self._snapshots if not self._in_use[key]]
        for key in idle[: max(0, len(self._snapshots) - SNAPSHOTS)]:
            saved = self._snapshots.pop(key)
            del self._in_use[key]
            if isinstance(saved, str):
                self.adapters.delete(saved)

    def _load_saved(self, path: Path) -> Network | str:
        checkpoint = checkpoints.read(path)
        checkpoints.check_base(checkpoint, self.base)
        if checkpoint.config is None:
            return self._load_network(path, self.base.dtype)
        return self._adapter_of(checkpoint, seed=0)

    def _activate_saved(self, saved: Network | str) -> Network:
        if isinstance(saved, Network):
            return saved
        self.adapters.use(saved)
        return self.base

    def _loaded(self, model: TrainedModel, checkpoint: Checkpoint, with_moments: bool) -> TrainedModel:
        config = checkpoint.config
        if config is None:
            stored = self._load_network(checkpoint.path, model.network.dtype)
            if with_moments:
                check_moments(checkpoint, model.parameters)
            restore_weights(checkpoint.path, model.parameters, dict(stored.model.named_parameters()))
            loaded = TrainedModel.new(model.spec, model.network, None, model.parameters)
        else:
            targets = None if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
            spec = msgspec.structs.replace(
                model.spec, rank=config.r, alpha=float(config.lora_alpha), target_modules=targets
            )
            name = self._adapter_of(checkpoint, model.spec.seed)
            loaded = TrainedModel.new(spec, self.base, name, self.adapters.parameters(name))
            if with_moments:
                try:
                    check_moments(checkpoint, loaded.parameters)
                except BadCheckpoint:
                    self.adapters.delete(name)
                    raise
        if with_moments:
            restore_moments(loaded, checkpoint)
        return loaded

    def _adapter_of(self, checkpoint: Checkpoint, seed: int) -> str:
        assert checkpoint.config is not None
        try:
            name = self.adapters.add(checkpoint.config, seed)
        except ValueError as error:  # the base has none of the adapter's modules
            raise BadCheckpoint(f"{checkpoint.path} does not fit this base model: {error}") from error
        try:
            restore_weights(checkpoint.path, self.adapters.parameters(name), checkpoint.weights)
        except BadCheckpoint:
            self.adapters.delete(name)
            raise
        return name

    def _full_copy(self, source: str) -> Network:
        """A trainable copy of the base, in float32 or better, whose matrix products are in the base's dtype."""
        dtype = torch.float32 if self.base.dtype == torch.bfloat16 else self.base.dtype
        network = self._load_network(source, dtype)
        network.model.requires_grad_(True)
        network.base_id = self.base.base_id
        if dtype != self.base.dtype:
            network.autocast = self.base.dtype
        return network
