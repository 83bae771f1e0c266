"""Logits: a tensor with the shape of the logits that holds a formula, and stores the logits only if it must.

If a torch function has a rule in `dispatch`, the rule turns forms into other forms or into results of the source.
Without a rule, the function runs on the stored tensor. Calls that bypass `__torch_function__` reach
`__torch_dispatch__` or an edge of the autograd graph, which do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tinkerbell_core.logits.lazy.dense import dense
from tinkerbell_core.logits.lazy.dispatch import RULES, UNCHANGED, name_of, refused
from tinkerbell_core.logits.lazy.form import Form, NotLazy
from tinkerbell_core.logits.lazy.origin import Origin, version, without_autocast
from tinkerbell_core.logits.lazy.weighted import Lazy, Weighted
from tinkerbell_core.logits.source import LogitsSource

_without_override = torch._C.DisableTorchFunctionSubclass
# Any, here and below: the arguments and results of any torch function


class Logits(torch.Tensor):
    """`[..., V]` logits, log-probabilities or probabilities that are not stored."""

    form: Lazy
    _edge: object
    _value: Tensor | None

    @staticmethod
    def over(source: LogitsSource, shape: Sequence[int], budget: int | None = None) -> Logits:
        """The logits of all rows of a source, `[*shape, V]`. budget: the limit on stored logits in bytes."""
        rows = torch.arange(source.count, device=source.device).view(*shape)
        return _tensor(Form(Origin(source, rows, budget), rows, rows.dim()))

    @property
    def origin(self) -> Origin:
        return self.form.origin

    @property
    def materialised(self) -> list[tuple[str, int]]:
        """(operation, bytes) of each tensor that was stored, for these logits and all that are computed from them."""
        return self.origin.materialised

    @property
    def hidden_states(self) -> Tensor:
        """Hidden states `[..., H]` of the model_outputs argument. AttributeError for a tensor computed from it."""
        form, rows = self.form, self.origin.rows
        if not (isinstance(form, Form) and form.is_original):
            raise AttributeError("hidden_states")
        return self.origin.source.hidden(rows.reshape(-1)).view(*rows.shape, -1)

    def stored(self, operation: str) -> Tensor:
        """The stored tensor, attached to the graph if this one is. Raises LogitsTooLarge."""
        self.origin.check()
        if self._value is None:
            stored = self.origin.stored(operation)
            with torch.enable_grad():
                self._value = dense(self.form, stored)
            if not _share_memory(self._value, stored):
                self.origin.record(operation, self._value)
        return self._value if torch.is_grad_enabled() else self._value.detach()

    def check(self) -> None:
        """Raise PlainLogitsNeeded if the loss used an operation that lazy logits do not support."""
        self.origin.check()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in UNCHANGED:
            with _without_override():
                return func(*args, **kwargs)
        for logits in _logits_in((args, kwargs)):
            logits.origin.check()
            _refuse_inside_func(logits)
            reason = refused(func, any(one is logits for one in _logits_in(args[:1])), kwargs)
            if reason or logits._is_foreign():
                logits.origin.refuse(reason or "the logits are an output of an autograd Function of the loss")
        if func in RULES:
            try:
                return _by_rule(func, args, kwargs)
            except NotLazy:
                pass
        return _on_stored(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handles calls below autograd: from torch.func, autograd Functions and C++."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _wrapper(args[0].form.without_gradient())
        for logits in _logits_in((args, kwargs)):
            logits.origin.check()
            _refuse_inside_func(logits)
            if func._schema.is_mutable and any(one is logits for one in _logits_in(args[:1])):
                logits.origin.refuse(f"the logits are changed in place by {func}")
        with torch.no_grad():
            stored = tree_map_only(Logits, lambda logits: _without_graph(logits.form, str(func)), (args, kwargs))
            return func(*stored[0], **stored[1])

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}, not stored)"

    def __format__(self, _: str) -> str:
        return repr(self)

    def _is_foreign(self) -> bool:
        """Whether autograd attached this tensor to a graph that its form does not represent."""
        with _without_override():
            return self.grad_fn is not self._edge


def _tensor(form: Lazy) -> Logits:
    """The tensor of a form, connected to the tensors that the form uses, so that no gradient is lost."""
    if not torch.is_grad_enabled():
        form = form.without_gradient()
    anchors = form.origin.source.anchors() if form.attached else []
    inputs = [t for t in (*anchors, *form.tensors()) if t.requires_grad]
    logits: Logits = _Edge.apply(form, *inputs) if inputs else _wrapper(form)  # type: ignore[no-untyped-call]
    with _without_override():
        logits._edge = logits.grad_fn
    return logits


def _wrapper(form: Lazy) -> Logits:
    source = form.origin.source
    logits: Logits = torch.Tensor._make_wrapper_subclass(Logits, form.shape, dtype=source.dtype, device=source.device)
    logits.form, logits._edge, logits._value = form, None, None
    return logits


class _Edge(torch.autograd.Function):
    """(form, tensors that it uses) -> its tensor."""

    @staticmethod
    def forward(ctx: Any, form: Lazy, *inputs: Tensor) -> Logits:
        ctx.form, ctx.inputs = form, inputs
        return _wrapper(form)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        origin: Origin = ctx.form.origin
        if torch.is_grad_enabled():
            origin.refuse("a second derivative is taken")
        origin.check()
        with torch.enable_grad():
            # a separate graph: that of the stored logits may be freed already, or may still be needed
            tensor = dense(ctx.form, origin.compute("a gradient of the whole tensor"))
        return None, *torch.autograd.grad(tensor, ctx.inputs, gradient, allow_unused=True)


def _by_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the rule of a function. Raises NotLazy."""
    rule, signature = RULES[func]
    given = list(_logits_in((args, kwargs)))
    lazy = tree_map_only(Logits, lambda logits: logits.form, (args, kwargs))
    try:
        arguments = signature.bind(*lazy[0], **lazy[1])
    except TypeError:
        raise NotLazy from None  # the rule does not support this overload
    with without_autocast(given[0].device):
        result = rule(*arguments.args, **arguments.kwargs)
    same = {id(logits.form): logits for logits in given}
    return tree_map_only((Form, Weighted), lambda form: same[id(form)] if id(form) in same else _tensor(form), result)


def _on_stored(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function on the stored tensors: an ordinary tensor."""
    name = name_of(func)
    given = {id(logits): (logits, logits.stored(name)) for logits in _logits_in((args, kwargs))}
    before = {key: version(stored) for key, (_, stored) in given.items()}
    args, kwargs = tree_map_only(Logits, lambda logits: given[id(logits)][1], (args, kwargs))
    result = func(*args, **kwargs)
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    for key, (logits, stored) in given.items():
        if version(stored) != before[key]:
            logits.origin.refuse(f"the logits are changed in place by {name}")
        for tensor in results:
            if _share_memory(tensor, stored):
                logits.origin.watch(tensor)
    return result


def _without_graph(form: Lazy, operation: str) -> Tensor:
    """The stored tensor without a graph, for calls below autograd."""
    return dense(form, form.origin.stored(operation, graph=False))


def _refuse_inside_func(logits: Logits) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        # the transform wraps tensors that are read inside it, and they must not be kept
        logits.origin.refuse("the logits are used inside a transform of torch.func")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _logits_in(tree: Any) -> Iterator[Logits]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Logits):
            yield leaf
