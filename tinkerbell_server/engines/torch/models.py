"""The trained models of one engine by id: creates, loads, deletes and activates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from tinkerbell_core.errors import BadCheckpoint, BadRequest, UnknownModel, did_you_mean
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.commands import Load
from tinkerbell_server.engines.torch import checkpoints
from tinkerbell_server.engines.torch.adapters import Adapters
from tinkerbell_server.engines.torch.checkpoints import Checkpoint, State
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.restore import check_moments, check_shapes, restore_moments, restore_weights
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
        # by path and autocast: the version, and a network or the name of an adapter on the base
        self._references: dict[tuple[str, torch.dtype | None], tuple[str, Network | str]] = {}
        # the same by the version of a folder, the most recently used last
        self._snapshots: dict[str, Network | str] = {}
        # the number of calls that draw samples from them now
        self._in_use: Counter[str] = Counter()

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._by_id

    def get(self, model_id: str) -> TrainedModel:
        """Raises UnknownModel."""
        if model_id not in self._by_id:
            known = ", ".join(self._by_id) or "none"
            raise UnknownModel(f"no model {model_id!r}{did_you_mean(model_id, self._by_id)} (available: {known})")
        return self._by_id[model_id]

    def create(self, spec: CreateModelRequest) -> TrainedModel:
        """Raises BadRequest if the id exists, BadHyperparameter for the adapter, BadCheckpoint for the reference."""
        if spec.model_id in self._by_id:
            raise BadRequest(f"model {spec.model_id!r} exists already: delete it, or use another id")
        if spec.reference not in ("base", "initial"):
            self._read(Path(spec.reference))
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

    def load(self, command: Load) -> tuple[TrainedModel, bool]:
        """The model with the weights of a checkpoint, and whether the optimizer's state was restored too.

        An adapter takes the target modules and the alpha of the checkpoint, and keeps its own dropout. The model is
        created if it does not exist and the command says how. Raises UnknownModel, BadCheckpoint and what `create`
        raises. Then nothing has changed.
        """
        if command.model_id in self._by_id or command.create is None:
            return self._load(self.get(command.model_id), Path(command.path), optimizer=command.optimizer)
        with self.adapters.restored_on_error():
            created = self.create(command.create)
            try:
                return self._load(created, Path(command.path), optimizer=command.optimizer)
            except BaseException:
                del self._by_id[created.id]
                raise

    def _load(self, model: TrainedModel, path: Path, *, optimizer: bool) -> tuple[TrainedModel, bool]:
        checkpoint = self._read(path)
        self._check_kind(model, checkpoint)
        with_moments = optimizer and checkpoint.moments is not None
        if with_moments:
            parameters = checkpoint.weights if checkpoint.config is not None else model.parameters
            check_moments(checkpoint, {name: tuple(own.shape) for name, own in parameters.items()})
        loaded = self._loaded(model, checkpoint, with_moments)
        state = checkpoint.state
        loaded.steps, loaded.calls = (state.step, state.calls) if state is not None else (0, 0)
        loaded.initial = str(path)
        if state is not None:
            if with_moments and _is_continued(model, state):
                loaded.initial = checkpoints.initial_of(state, self.data_folder)
            loaded.saved_path, loaded.saved_step = str(path), state.step
        self._by_id[model.id] = loaded
        if model.adapter is not None:
            self.adapters.delete(model.adapter)
        return loaded, with_moments

    def activate(self, model: TrainedModel | None) -> Network:
        """The network of a model, with its adapter active; None for the base without an adapter."""
        if model is None or model.adapter is not None:
            self.adapters.use(model.adapter if model is not None else None)
        return model.network if model is not None else self.base

    def reference_key(self, name: str, model: TrainedModel) -> str:
        """A text for each content of a reference and each precision of it. Raises BadCheckpoint if a path is gone."""
        version = name if name == "base" else checkpoints.version_of(Path(name))
        return version if model.network.autocast is None else f"{version}|{model.network.autocast}"

    def reference(self, name: str, model: TrainedModel) -> Network:
        """The activated network of a reference of a model: "base" or a path. It stays loaded. Raises BadCheckpoint.

        It computes in the precision of the model, so that a new model and its reference are equal.
        """
        if name == "base" and model.network.autocast is None:
            return self.activate(None)
        key = (name, model.network.autocast)
        version = self.reference_key(name, model)
        loaded = self._references.get(key)
        if loaded is None or loaded[0] != version:
            fresh = self._load_reference(name, model.network)
            if loaded is not None:
                self._unload(loaded[1])
            loaded = self._references[key] = (version, fresh)
        return self._activate_saved(loaded[1])

    @contextmanager
    def for_samples(self, path: Path | None, model_id: str | None) -> Iterator[Callable[[], Network]]:
        """A function that activates a saved folder, a model, or without both the base, and returns its network.

        What it activates stays loaded until the end of the block; of other saved folders, the last few do. Raises
        UnknownModel, BadCheckpoint.
        """
        if path is None:
            yield partial(self.activate, None if model_id is None else self.get(model_id))
            return
        version = checkpoints.version_of(path)
        saved = self._snapshots.pop(version, None)
        if saved is None:
            saved = self._load_saved(path)
        self._snapshots[version] = saved
        self._in_use[version] += 1
        try:
            self._unload_snapshots()
            yield partial(self._activate_saved, saved)
        finally:
            self._in_use[version] -= 1

    def _unload_snapshots(self) -> None:
        """Unload the saved folders that were used longest ago and from which no samples are drawn now."""
        idle = [version for version in self._snapshots if not self._in_use[version]]
        for version in idle[: max(0, len(self._snapshots) - SNAPSHOTS)]:
            self._unload(self._snapshots.pop(version))
            del self._in_use[version]

    def _unload(self, saved: Network | str) -> None:
        if isinstance(saved, str):
            self.adapters.delete(saved)

    def _load_reference(self, name: str, like: Network) -> Network | str:
        if name == "base":
            network = self._load_network(self.base.source, like.dtype)
        else:
            checkpoint = self._read(Path(name))
            if checkpoint.config is not None:
                return self._adapter_of(checkpoint, seed=0)
            network = self._load_folder(checkpoint, like.dtype)
        return _frozen(network, like.autocast)

    def _load_saved(self, path: Path) -> Network | str:
        checkpoint = self._read(path)
        if checkpoint.config is None:
            return self._load_folder(checkpoint, self.base.dtype)
        return self._adapter_of(checkpoint, seed=0)

    def _read(self, path: Path) -> Checkpoint:
        """A checkpoint whose adapter, if it is one, fits the base model. Raises BadCheckpoint."""
        checkpoint = checkpoints.read(path)
        checkpoints.check_base(checkpoint, self.base)
        if checkpoint.config is None:
            return checkpoint
        try:
            shapes = self.adapters.shapes(checkpoint.config)
        except ValueError as error:
            raise BadCheckpoint(f"checkpoint {checkpoint.name!r} does not fit this base model: {error}") from None
        checkpoint = replace(checkpoint, weights=self._without_base_weights(checkpoint))
        check_shapes(checkpoint.name, shapes, checkpoint.weights)
        return checkpoint

    def _without_base_weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights of the adapter alone: PEFT also saves the embedding of the base if an adapter is on it."""
        kept = {}
        for name, weight in checkpoint.weights.items():
            if ".lora_" in name:
                kept[name] = weight
                continue
            own = self.adapters.base_weight(name)
            if own is None:
                kept[name] = weight  # for the error of check_shapes
            elif not _same_weight(own, weight):
                raise BadCheckpoint(
                    f"checkpoint {checkpoint.name!r} has another {name!r} than this base model, which other models use "
                    "too: save it without the weights of the base (save_embedding_layers=False), or load a full model"
                )
        return kept

    def _load_folder(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Network:
        try:
            return self._load_network(checkpoint.path, dtype)
        except BadRequest as error:
            reason = error.message.replace(str(checkpoint.path), checkpoint.name)
            raise BadCheckpoint(f"checkpoint {checkpoint.name!r} cannot be read: {reason}") from error

    def _check_kind(self, model: TrainedModel, checkpoint: Checkpoint) -> None:
        """Raise BadCheckpoint if the checkpoint is not of the same kind and rank as the model."""
        if (checkpoint.config is None) != (model.adapter is None):
            saved = "a full model" if checkpoint.config is None else "an adapter"
            current = "an adapter" if model.adapter else "a full model"
            raise BadCheckpoint(
                f"checkpoint {checkpoint.name!r} contains {saved}, but model {model.id!r} is {current}: create a model "
                "of the same kind"
            )
        if checkpoint.config is not None and checkpoint.config.r != model.spec.rank:
            raise BadCheckpoint(
                f"the adapter in checkpoint {checkpoint.name!r} has rank {checkpoint.config.r}, but model "
                f"{model.id!r} has rank {model.spec.rank}: create the model with rank={checkpoint.config.r}"
            )

    def _activate_saved(self, saved: Network | str) -> Network:
        if isinstance(saved, Network):
            return saved
        self.adapters.use(saved)
        return self.base

    def _loaded(self, model: TrainedModel, checkpoint: Checkpoint, with_moments: bool) -> TrainedModel:
        config = checkpoint.config
        if config is None:
            stored = self._load_folder(checkpoint, model.network.dtype)
            restore_weights(checkpoint.name, model.parameters, dict(stored.model.named_parameters()))
            loaded = TrainedModel.new(model.spec, model.network, None, model.parameters)
        else:
            targets = None if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
            spec = msgspec.structs.replace(model.spec, alpha=float(config.lora_alpha), target_modules=targets)
            config.lora_dropout = model.spec.dropout
            name = self._adapter_of(checkpoint, model.spec.seed)
            loaded = TrainedModel.new(spec, self.base, name, self.adapters.parameters(name))
        if with_moments:
            restore_moments(loaded, checkpoint)
        return loaded

    def _adapter_of(self, checkpoint: Checkpoint, seed: int) -> str:
        """The name of a new adapter with the weights of a checkpoint, which has passed `_read`."""
        assert checkpoint.config is not None
        try:
            with self.adapters.restored_on_error():
                name = self.adapters.add(checkpoint.config, seed)
                restore_weights(checkpoint.name, self.adapters.parameters(name), checkpoint.weights)
        except ValueError as error:
            raise BadCheckpoint(f"checkpoint {checkpoint.name!r} does not fit this base model: {error}") from error
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


def _is_continued(model: TrainedModel, state: State) -> bool:
    """Whether a checkpoint is of this model, whose reference was its initial weights: then they stay its reference."""
    return state.spec.model_id == model.id and state.spec.reference == "initial" == model.spec.reference


def _same_weight(own: Tensor, saved: Tensor) -> bool:
    """Whether two weights are equal in the dtype of one of them."""
    saved = saved.to(own.device)
    return own.shape == saved.shape and (
        torch.equal(own, saved.to(own.dtype)) or torch.equal(own.to(saved.dtype), saved)
    )


def _frozen(network: Network, autocast: torch.dtype | None) -> Network:
    """The network with its matrix products in a narrower dtype."""
    network.autocast = autocast
    if autocast is not None:
        head = network.model.get_output_embeddings()
        for module in network.model.modules():
            # autocast would convert these weights for each product, with the same result
            if type(module) is nn.Linear and module is not head:
                module.to(autocast)
    return network
