"""The LoRA adapters, by PEFT, on one shared base network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from tinkerbell_core.errors import BadHyperparameter, did_you_mean
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.engines.torch.module_snapshot import restored_on_error
from tinkerbell_server.engines.torch.network import Network

Peft = Any  # peft has no type hints

_UNKNOWN = "?"


class Adapters:
    """Adds, activates and deletes adapters, which are named m0, m1, … in the order they are created.

    At most one adapter is active. Adding or deleting one does not change the weights of the others.
    default_targets: every linear layer except the head. parts: target modules by part: attention, mlp, unembed.
    features: the input and output features of each module that can have an adapter, added up, by its full name.
    """

    def __init__(self, base: Network) -> None:
        self.base = base
        self.peft: Peft = None
        self._created = 0
        self._active: str | None = None
        head = base.model.get_output_embeddings()
        modules = [(name, module) for name, module in base.model.named_modules() if name]
        # read now, because each adapter adds linear layers to the model
        self.default_targets = sorted(
            {_leaf(name) for name, module in modules if isinstance(module, nn.Linear | Conv1D) and module is not head}
        )
        self._targets = {
            _leaf(name) for name, module in modules if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        }
        self._modules = {name: _lora_shape(module) for name, module in modules}
        self._names = [name for name in self._modules if _leaf(name) in self._targets]
        self.features = {name: shape[1] + shape[2] for name, shape in self._modules.items() if shape is not None}
        self.parts = _targets_by_part(
            [(name, module is head) for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
        )

    def config_of(self, spec: CreateModelRequest) -> LoraConfig:
        """The PEFT config of a model with a rank. Raises BadHyperparameter for a module that the base does not have."""
        assert spec.rank is not None
        targets = self.default_targets if spec.target_modules is None else spec.target_modules
        self._check_targets(spec.model_id, targets)
        alpha: Peft = spec.alpha  # declared int in peft, but any number works
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=alpha,
            lora_dropout=spec.dropout,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        )
        try:
            self.shapes(config)
        except ValueError as error:
            raise BadHyperparameter(f"model {spec.model_id!r}: {error}") from None
        return config

    def shapes(self, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each weight that an adapter with this config has, by its name in a PEFT file.

        Raises ValueError for a target that the base does not have or that cannot have an adapter. Adds nothing.
        """
        targets = config.target_modules
        if targets == "all-linear":
            config.target_modules = targets = list(self.default_targets)
        for target in () if isinstance(targets, str) else sorted(targets or ()):
            if not any(_is_target(target, name) for name in self._modules):
                raise ValueError(f"the base model has no module {target!r} (target_modules){self._hint(target)}")
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._modules.items():
            try:
                matches = check_target_module_exists(config, name)
            except re.error as error:
                raise ValueError(f"a regular expression of its config is not valid: {error}") from None
            if not (matches is True or isinstance(matches, re.Match)):
                continue
            if shape is None:
                raise ValueError(f"the module {name!r} of the base model cannot have an adapter (target_modules)")
            kind, inputs, outputs = shape
            ranks = config.rank_pattern or {}
            rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
            end = "" if kind == "lora_embedding" else ".weight"
            found[f"base_model.model.{name}.{kind}_A{end}"] = (rank, inputs)
            found[f"base_model.model.{name}.{kind}_B{end}"] = (outputs, rank)
        if not found:
            raise ValueError(f"the base model has none of its modules (target_modules): {targets}")
        return found

    def base_weight(self, name: str) -> Tensor | None:
        """The weight of the base that has this name in a PEFT file; None if it has none."""
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        for key, parameter in self.base.model.named_parameters(remove_duplicate=False):
            if key.replace(".base_layer.", ".") == name:
                weight: Tensor = parameter.detach()
                return weight
        return None

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """After an exception, set the network back to what it is now."""
        peft, created, active = self.peft, self._created, self._active
        try:
            with restored_on_error(self.base.model if peft is None else peft):
                yield
        except BaseException:
            self.peft, self._created, self._active = peft, created, active
            raise

    def add(self, config: LoraConfig, seed: int) -> str:
        """Add an adapter, initialised from `seed` alone, and activate it; its name.

        If PEFT raises an exception, the network has not changed.
        """
        with self.restored_on_error():
            return self._add(config, seed)

    def _add(self, config: LoraConfig, seed: int) -> str:
        name = f"m{self._created}"
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            # peft warns about a deprecated name that it uses itself, and about an adapter on a tied head, which the
            # result of save reports
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            if self.peft is None:
                self.peft = PeftModel(self.base.model, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
        self._created += 1
        self.base.model.train(self.base.model.training)  # peft creates the new layers in train mode
        self._activate(name)
        return name

    def delete(self, name: str) -> None:
        with warnings.catch_warnings():  # peft warns that it activates another adapter, which `use` corrects
            warnings.simplefilter("ignore")
            self.peft.delete_adapter(name)
        self._active = _UNKNOWN

    def use(self, name: str | None) -> None:
        """Make this adapter the active one; None for the base without an adapter."""
        if self.peft is None or name == self._active:
            return
        self._activate(name)

    def parameters(self, name: str) -> dict[str, Parameter]:
        """The weights of an adapter, by the names that they have in a PEFT file."""
        found = {}
        for key, parameter in self.peft.named_parameters():
            parts = key.split(".")
            if name in parts and any(part.startswith("lora_") for part in parts):
                found[".".join(part for part in parts if part != name)] = parameter
        return found

    def _check_targets(self, model_id: str, targets: Sequence[str]) -> None:
        for target in targets:
            if not any(_is_target(target, name) for name in self._names):
                raise BadHyperparameter(
                    f"model {model_id!r}: the base model has no module {target!r} that can have an adapter"
                    f"{self._hint(target)}"
                )

    def _hint(self, target: str) -> str:
        return f"{did_you_mean(target, self._targets)} (it has {', '.join(sorted(self._targets))})"

    def _activate(self, name: str | None) -> None:
        if name is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(name)
        self._active = name


def _targets_by_part(layers: Sequence[tuple[str, bool]]) -> dict[str, list[str]]:
    """Target modules by part of the network. layers: the name of each linear layer, and whether it is the head.

    A target is the last component of a name, or the last two if layers of several parts share the last one.
    """
    part_of = {
        name: "unembed" if is_head else "attention" if re.search(r"(^|[._])(attn|attention)", name) else "mlp"
        for name, is_head in layers
    }
    parts_of_leaf: dict[str, set[str]] = {}
    for name, part in part_of.items():
        parts_of_leaf.setdefault(_leaf(name), set()).add(part)
    targets: dict[str, set[str]] = {}
    for name, part in part_of.items():
        shared = len(parts_of_leaf[_leaf(name)]) > 1
        targets.setdefault(part, set()).add(".".join(name.split(".")[-2:]) if shared else _leaf(name))
    return {part: sorted(names) for part, names in targets.items()}


def _lora_shape(module: nn.Module) -> tuple[str, int, int] | None:
    """The kind of LoRA of a module, the size of its input and of its output; None if it cannot have an adapter."""
    if isinstance(module, nn.Linear):
        return "lora", module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return "lora", module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return "lora_embedding", module.num_embeddings, module.embedding_dim
    return None


def _is_target(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
