"""LoRA adapters by PEFT on one shared base, and full copies of it. A neighbour's weights are never touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from tinkerbell_core.errors import BadHyperparameter, did_you_mean
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.engines.torch.network import Network

Peft = Any  # peft is untyped

_UNKNOWN = "?"


class Adapters:
    """The adapters of one base network: m0, m1, … by order of birth; at most one is active."""

    def __init__(self, base: Network) -> None:
        self.base = base
        self.peft: Peft = None
        self._born = 0
        self._active: str | None = None
        head = base.model.get_output_embeddings()
        modules = [(name, module) for name, module in base.model.named_modules() if name]
        # taken once, before the first adapter adds linear layers of its own
        self.default_targets = sorted(
            {_leaf(name) for name, module in modules if isinstance(module, nn.Linear | Conv1D) and module is not head}
        )
        self._targets = {
            _leaf(name) for name, module in modules if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        }
        self._names = [name for name, module in modules if _leaf(name) in self._targets]
        self.parts = _parts(
            [(name, module is head) for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
        )

    def config_of(self, spec: CreateModelRequest) -> LoraConfig:
        """The LoRA that a request asks for. Raises BadHyperparameter for a rank, alpha or module that cannot be."""
        if spec.rank is None or spec.rank < 1:
            raise BadHyperparameter(
                f"model {spec.model_id!r}: rank is {spec.rank}, but must be at least 1 (full=True trains all weights)"
            )
        if not 0 < spec.alpha < float("inf"):
            raise BadHyperparameter(f"model {spec.model_id!r}: alpha is {spec.alpha}, but must be a positive number")
        targets = self.default_targets if spec.target_modules is None else spec.target_modules
        self.check_targets(spec.model_id, targets)
        alpha: Peft = spec.alpha  # declared int, but any number works
        return LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")

    def check_targets(self, whose: str, targets: Sequence[str]) -> None:
        """Raise BadHyperparameter for a module that the base has not."""
        if not targets:
            raise BadHyperparameter(f"model {whose!r}: target_modules is empty; leave it out for every linear layer")
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in self._names):
                raise BadHyperparameter(
                    f"model {whose!r}: the base has no module {target!r} for an adapter"
                    f"{did_you_mean(target, self._targets)} (it has: {', '.join(sorted(self._targets))})"
                )

    def add(self, config: LoraConfig, seed: int) -> str:
        """A new adapter, initialised from `seed` alone; its internal name."""
        name = f"m{self._born}"
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            # peft asks transformers by an old name, and warns of an adapter on a tied head, which is what was asked for
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            if self.peft is None:
                self.peft = PeftModel(self.base.model, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
        self._born += 1
        self.base.model.train(self.base.model.training)  # the new layers are born in train mode
        self._activate(name)
        return name

    def delete(self, name: str) -> None:
        with warnings.catch_warnings():  # that another is chosen, which the next use settles
            warnings.simplefilter("ignore")
            self.peft.delete_adapter(name)
        self._active = _UNKNOWN  # peft may have chosen another

    def use(self, name: str | None) -> None:
        """Make this adapter the active one; None: the base alone."""
        if self.peft is None or name == self._active:
            return
        self._activate(name)

    def parameters(self, name: str) -> dict[str, Parameter]:
        """The adapter's weights under the names they have in a PEFT file."""
        found = {}
        for key, parameter in self.peft.named_parameters():
            parts = key.split(".")
            if name in parts and any(part.startswith("lora_") for part in parts):
                found[".".join(part for part in parts if part != name)] = parameter
        return found

    def _activate(self, name: str | None) -> None:
        if name is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(name)
        self._active = name


def _parts(layers: Sequence[tuple[str, bool]]) -> dict[str, list[str]]:
    """Targets by part of the network, from each linear layer's name and whether it is the head.

    A target is a layer's last name; two, where layers of several parts share the last.
    """
    part_of = {
        name: "unembed" if is_head else "attention" if re.search(r"(^|[._])(attn|attention)", name) else "mlp"
        for name, is_head in layers
    }
    of_leaf: dict[str, set[str]] = {}
    for name, part in part_of.items():
        of_leaf.setdefault(_leaf(name), set()).add(part)
    parts: dict[str, set[str]] = {}
    for name, part in part_of.items():
        shared = len(of_leaf[_leaf(name)]) > 1
        parts.setdefault(part, set()).add(".".join(name.split(".")[-2:]) if shared else _leaf(name))
    return {part: sorted(targets) for part, targets in parts.items()}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
