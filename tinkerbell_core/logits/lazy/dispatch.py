"""Tables of torch functions: those with a rule, those that read only metadata, and those that need plain logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.logits.lazy import arithmetic, factories, gather_topk, losses, softmaxes, sums, views

Rule = Callable[..., Any]
_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg)


def _functions(name: str) -> Iterable[Any]:  # Any: functions, methods and property getters
    """All functions, methods and properties of torch with this name."""
    for namespace in _NAMESPACES:
        found = getattr(namespace, name, None)
        if inspect.isgetsetdescriptor(found) or isinstance(found, property):
            yield found.__get__
        elif found is not None:
            yield found


def _all(names: str) -> frozenset[Any]:  # Any: as above
    return frozenset(function for name in names.split() for function in _functions(name))


RULES = {
    function: (rule, inspect.signature(rule))
    for module in (arithmetic, losses, factories, gather_topk, softmaxes, sums, views)
    for names, rule in module.RULES.items()
    for name in names.split()
    for function in _functions(name)
}

UNCHANGED = _all(
    """shape dtype device layout ndim requires_grad is_leaf itemsize nbytes is_cpu is_cuda is_meta is_mps is_quantized
    is_sparse is_complex is_floating_point is_signed is_inference is_contiguous is_nested is_tensor is_same_size size
    dim ndimension numel nelement stride storage_offset element_size get_device __len__ __hash__ __repr__ output_nr"""
)

_REFUSED = _all(
    """register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad retains_grad backward grad grad_fn
    _backward_hooks _grad _grad_fn data_ptr untyped_storage storage _typed_storage numpy __array__ __dlpack__
    __cuda_array_interface__ __reduce_ex__ __deepcopy__ set_"""
) | {torch.autograd.grad, torch.autograd.backward}

_IN_PLACE = _all(
    """__setitem__ __iadd__ __isub__ __imul__ __idiv__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__
    __ixor__ __ilshift__ __irshift__"""
)


def refused(func: Any, is_first: bool, kwargs: dict[str, Any]) -> str:  # Any: any torch function
    """Why a function needs plain logits; an empty string if it works on lazy ones.

    is_first: whether the logits are the first argument of the function.
    """
    name = name_of(func)
    if func in _REFUSED:
        return f"the loss calls {name} on the logits"
    if is_first and getattr(func, "__name__", "") in ("__set__", "__delete__"):
        return f"the loss sets {name} of the logits"
    if is_first and (func in _IN_PLACE or kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__"))):
        return f"the logits are changed in place by {name}"
    if kwargs.get("out") is not None:
        return f"the loss calls {name}(out=...) with the logits"
    return ""


def name_of(func: Any) -> str:  # Any: as above
    """The name of this function for users."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__", "__delete__"):
        return str(getattr(func.__self__, "__name__", name))
    return name
