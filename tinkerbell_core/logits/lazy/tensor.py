"""Logits: a tensor of the shape of the logits that holds a formula instead, and the true tensor only where it must.

A torch function is looked up in the table of rules; a rule turns forms into forms or into what the source answers.
Without a rule the function runs on the true tensor. Beneath both, where torch calls past `__torch_function__`,
`__torch_dispatch__` and an edge of autograd's graph do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tinkerbell_core.logits.lazy.dense import dense
from tinkerbell_core.logits.lazy.dispatch import AS_THEY_ARE, RULES, name_of, refused
from tinkerbell_core.logits.lazy.family import Family, exactly, version
from tinkerbell_core.logits.lazy.form import Form
from tinkerbell_core.logits.lazy.rule import NotLazy
from tinkerbell_core.logits.lazy.weighted import Lazy, Weighted
from tinkerbell_core.logits.source import LogitsSource

_plainly = torch._C.DisableTorchFunctionSubclass
# Any, here and below: the arguments and results of any torch function


class Logits(torch.Tensor):
    """`[..., V]` logits, log-probabilities or probabilities that are not stored."""

    form: Lazy
    _edge: object
    _value: Tensor | None

    @staticmethod
    def over(source: LogitsSource, shape: Sequence[int], budget: int | None = None) -> Logits:
        """The logits of all rows of a source, `[*shape, V]`; at most `budget` bytes of them may come to be stored."""
        rows = torch.arange(source.count, device=source.device).view(*shape)
        return _tensor(Form(Family(source, rows, budget), rows, rows.dim()))

    @property
    def family(self) -> Family:
        return self.form.family

    @property
    def materialised(self) -> list[tuple[str, int]]:
        """(operation, bytes) of all that had to be stored, of these logits and of what came of them."""
        return self.family.materialised

    @property
    def hidden_states(self) -> Tensor:
        """Of the logits as they were given, `[..., H]`; AttributeError for what was computed from them."""
        form, rows = self.form, self.family.rows
        if not (isinstance(form, Form) and form.as_given):
            raise AttributeError("hidden_states")
        return self.family.source.hidden(rows.reshape(-1)).view(*rows.shape, -1)

    def stored(self, operation: str) -> Tensor:
        """The true tensor, attached where this one is. Raises LogitsTooLarge."""
        self.family.check()
        if self._value is None:
            stored = self.family.stored(operation)
            with torch.enable_grad():
                self._value = dense(self.form, stored)
            if not _share_memory(self._value, stored):
                self.family.record(operation, self._value)
        return self._value if torch.is_grad_enabled() else self._value.detach()

    def check(self) -> None:
        """Raise PlainLogitsNeeded where a loss that ran to its end did what lazy logits cannot answer."""
        self.family.check()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in AS_THEY_ARE:
            with _plainly():
                return func(*args, **kwargs)
        for logits in _logits_in((args, kwargs)):
            logits.family.check()
            _refuse_inside_func(logits)
            what = refused(func, any(one is logits for one in _logits_in(args[:1])), kwargs)
            if what or logits._is_foreign():
                logits.family.refuse(what or "the logits come out of an autograd Function of the loss")
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
        """The net beneath: torch.func, autograd Functions and C++ come here, below autograd."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _wrapper(args[0].form.without_gradient())
        for logits in _logits_in((args, kwargs)):
            logits.family.check()
            _refuse_inside_func(logits)
            if func._schema.is_mutable and any(one is logits for one in _logits_in(args[:1])):
                logits.family.refuse(f"the logits are changed in place by {func}")
        with torch.no_grad():
            stored = tree_map_only(Logits, lambda logits: _without_graph(logits.form, str(func)), (args, kwargs))
            return func(*stored[0], **stored[1])

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}, not stored)"

    def __format__(self, _: str) -> str:
        return repr(self)

    def _is_foreign(self) -> bool:
        """Whether autograd has given this tensor a history that its form knows nothing of."""
        with _plainly():
            return self.grad_fn is not self._edge


def _tensor(form: Lazy) -> Logits:
    """A tensor of a form; tied to what the form rests on, so that gradients that reach it below Python are not lost."""
    if not torch.is_grad_enabled():
        form = form.without_gradient()
    anchors = form.family.source.anchors() if form.attached else []
    held = [t for t in (*anchors, *form.parts()) if t.requires_grad]
    logits: Logits = _Edge.apply(form, *held) if held else _wrapper(form)  # type: ignore[no-untyped-call]
    with _plainly():
        logits._edge = logits.grad_fn
    return logits


def _wrapper(form: Lazy) -> Logits:
    source = form.family.source
    logits: Logits = torch.Tensor._make_wrapper_subclass(Logits, form.shape, dtype=source.dtype, device=source.device)
    logits.form, logits._edge, logits._value = form, None, None
    return logits


class _Edge(torch.autograd.Function):
    """(form, tensors it rests on) -> its tensor."""

    @staticmethod
    def forward(ctx: Any, form: Lazy, *held: Tensor) -> Logits:
        ctx.form, ctx.held = form, held
        return _wrapper(form)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        family: Family = ctx.form.family
        if torch.is_grad_enabled():
            family.refuse("a second derivative is taken")
        family.check()
        with torch.enable_grad():
            # a graph of its own: that of the stored logits may be gone by now, or be needed still
            true = dense(ctx.form, family.built("a gradient of the whole tensor"))
        return None, *torch.autograd.grad(true, ctx.held, gradient, allow_unused=True)


def _by_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the function's rule makes of the forms. Raises NotLazy."""
    rule, signature = RULES[func]
    given = list(_logits_in((args, kwargs)))
    lazy = tree_map_only(Logits, lambda logits: logits.form, (args, kwargs))
    try:
        arguments = signature.bind(*lazy[0], **lazy[1])
    except TypeError:
        raise NotLazy from None  # an overload the rule does not know
    with exactly(given[0].device):
        result = rule(*arguments.args, **arguments.kwargs)
    same = {id(logits.form): logits for logits in given}
    return tree_map_only((Form, Weighted), lambda form: same[id(form)] if id(form) in same else _tensor(form), result)


def _on_stored(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function on the true tensors; what it gives is an ordinary tensor."""
    name = name_of(func)
    given = {id(logits): (logits, logits.stored(name)) for logits in _logits_in((args, kwargs))}
    before = {key: version(stored) for key, (_, stored) in given.items()}
    args, kwargs = tree_map_only(Logits, lambda logits: given[id(logits)][1], (args, kwargs))
    result = func(*args, **kwargs)
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    for key, (logits, stored) in given.items():
        if version(stored) != before[key]:
            logits.family.refuse(f"the logits are changed in place by {name}")
        for tensor in results:
            if _share_memory(tensor, stored):
                logits.family.watch(tensor)
    return result


def _without_graph(form: Lazy, operation: str) -> Tensor:
    """The true tensor, below autograd, where no graph can be built."""
    return dense(form, form.family.stored(operation, graph=False))


def _refuse_inside_func(logits: Logits) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        # what is read there is wrapped for the transform, and must not be kept for later
        logits.family.refuse("the logits are used inside a transform of torch.func")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _logits_in(tree: Any) -> Iterator[Logits]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Logits):
            yield leaf
