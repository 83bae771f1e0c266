"""One loss, however it arrived: its function, and what can be said of it without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from tinkerbell_core.digest import digest_of, source_of
from tinkerbell_core.errors import BadLoss
from tinkerbell_core.hyperparameters import Hyperparameter, Range, bind_hyperparameters, hyperparameters_of

if TYPE_CHECKING:
    from torch import Tensor

    from tinkerbell_core.logits.source import Statistic
    from tinkerbell_core.output import LossFnOutput

Coupling = Literal["sequence", "batch"]


class LossFn(Protocol):
    """`model_outputs` float `[B, T, V]`, inputs right-padded to the batch, `attention_mask` `[B, T]`."""

    # Any: each loss has keyword hyperparameters of its own; only (*args, **kwargs) stands for all of them to mypy
    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *args: Any,
        **hyperparameters: Any,
    ) -> LossFnOutput: ...


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who brought a loss: a distribution's entry point, an upload, or this process.

    owner: of an upload, the tenant; None is the one of a server without keys.
    """

    kind: Literal["local", "entry_point", "upload"] = "local"
    distribution: str | None = None
    version: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One loss of a weighted sum, as it was when the sum was made."""

    name: str
    weight: float
    id: str
    digest: str


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss function and its description. Calling it calls the function.

    inputs: keys the loss cannot do without, None where that is not known before a dry run.
    optional_inputs: keys it reads when present.
    finite: inputs whose numbers must be finite where the position counts.
    coupling: "sequence" when sequences (or groups) do not see each other; "batch" is the default for anything unknown.
    group_size: rows that belong together (2 for preference pairs, rows 2i and 2i+1).
    plain_logits: why it must be given stored logits, found by a dry run; empty where lazy ones do.
    materialises: operations of it that build the logits all the same.
    reads, reads_beside: statistics it asks for of the same rows, with a gradient and without.
    parts: what a weighted sum is made of; empty for any other loss.
    example_inputs, example_hyperparameters: to try it with, where made-up ones would not do.
    """

    name: str
    fn: LossFn
    summary: str
    inputs: tuple[str, ...] | None
    optional_inputs: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    coupling: Coupling
    group_size: int
    finite: tuple[str, ...]
    source: str
    digest: str
    provenance: Provenance = field(default_factory=Provenance)
    plain_logits: str = ""
    materialises: tuple[str, ...] = ()
    reads: tuple[Statistic, ...] = ()
    reads_beside: tuple[Statistic, ...] = ()
    parts: tuple[Part, ...] = ()
    example_inputs: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    example_hyperparameters: Mapping[str, Any] = field(default_factory=dict, compare=False)  # Any: each has its own

    # Any: passes on whatever the loss takes
    def __call__(self, *args: Any, **kwargs: Any) -> LossFnOutput:
        return self.fn(*args, **kwargs)

    @property
    def id(self) -> str:
        """`distribution:loss`, or `upload:name@<12 of digest>`; what a name resolves to, and never changes.

        An upload with an owner is `upload:owner/name@<12 of digest>`; a sum of this process, `sum:` and its terms.
        """
        if self.parts and self.provenance.kind == "local":
            return "sum:" + "+".join(f"{part.weight:.12g}*{part.id}" for part in self.parts)
        if self.provenance.kind == "upload":
            owner = f"{self.provenance.owner}/" if self.provenance.owner else ""
            return f"upload:{owner}{self.name}@{self.digest[:12]}"
        return f"{self.provenance.distribution or 'local'}:{self.name}"

    def from_(self, provenance: Provenance) -> LossSpec:
        """The same loss, brought by somebody."""
        return replace(self, provenance=provenance)

    def bind(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of one call: `config` over the defaults.

        Raises BadHyperparameter for a name the loss does not have, a missing required one, or a value of another type.
        """
        return bind_hyperparameters(self.name, self.hyperparameters, config)


@overload
def loss(fn: LossFn, /) -> LossSpec: ...
@overload
def loss(
    *,
    name: str | None = None,
    inputs: tuple[str, ...] | None = None,
    optional_inputs: tuple[str, ...] = (),
    coupling: Coupling = "batch",
    group_size: int = 1,
    finite: tuple[str, ...] = (),
    allowed: Mapping[str, Range] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    example_hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> Callable[[LossFn], LossSpec]: ...
def loss(
    fn: LossFn | None = None,
    /,
    *,
    name: str | None = None,
    inputs: tuple[str, ...] | None = None,
    optional_inputs: tuple[str, ...] = (),
    coupling: Coupling = "batch",
    group_size: int = 1,
    finite: tuple[str, ...] = (),
    allowed: Mapping[str, Range] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    example_hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> LossSpec | Callable[[LossFn], LossSpec]:
    """Make a LossSpec of a function. Hyperparameters are read from its signature.

    allowed: which numbers a hyperparameter may be (`{"beta": above(0)}`); others are refused before the loss is run.
    example_inputs, example_hyperparameters: to try it with, where inputs made up by name and the defaults would not do.
    Raises BadLoss where the signature cannot be a loss's.
    """

    def decorate(fn: LossFn) -> LossSpec:
        if coupling not in ("sequence", "batch"):
            raise BadLoss(f"coupling is {coupling!r}, but must be 'sequence' or 'batch'")
        if group_size < 1:
            raise BadLoss(f"group_size is {group_size}, but must be at least 1")
        return LossSpec(
            name=name or str(getattr(fn, "__name__", "loss")),
            fn=fn,
            summary=(inspect.getdoc(fn) or "").partition("\n")[0],
            inputs=inputs,
            optional_inputs=optional_inputs,
            hyperparameters=hyperparameters_of(fn, allowed or {}),
            coupling=coupling,
            group_size=group_size,
            finite=finite,
            example_inputs=dict(example_inputs or {}),
            example_hyperparameters=dict(example_hyperparameters or {}),
            source=source_of(fn),
            digest=digest_of(fn, coupling=coupling, group_size=group_size),
        )

    return decorate(fn) if fn is not None else decorate


def family(**common: Any) -> Callable[..., Callable[[LossFn], LossSpec]]:  # Any: what loss() takes
    """A `@loss` for a family of losses: what they declare alike is said once, and each may say otherwise."""

    def declared(**different: Any) -> Callable[[LossFn], LossSpec]:  # Any: as above
        return loss(**{**common, **different})

    return declared
