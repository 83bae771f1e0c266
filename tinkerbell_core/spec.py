"""The description of one loss: its function, inputs, hyperparameters, coupling and origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tinkerbell_core.errors import BadLoss
from tinkerbell_core.hyperparameters import Hyperparameter, bind_hyperparameters

if TYPE_CHECKING:
    from torch import Tensor

    from tinkerbell_core.logits.source import Statistic
    from tinkerbell_core.output import LossFnOutput

Coupling = Literal["sequence", "batch"]


class LossFn(Protocol):
    """model_outputs: float `[B, T, V]`. loss_fn_inputs: right-padded to the batch. attention_mask: `[B, T]`."""

    # Any: each loss has different hyperparameters, and mypy accepts all of them only for (*args, **kwargs)
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
    """The origin of a loss: an entry point of a distribution, an upload, or this process.

    owner: the tenant of an upload; None on a server without keys.
    """

    kind: Literal["local", "entry_point", "upload"] = "local"
    distribution: str | None = None
    version: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One loss of a weighted sum, as it was when the sum was created."""

    name: str
    weight: float
    id: str
    digest: str


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss function and its description. Calling the spec calls the function.

    inputs: the required keys of loss_fn_inputs; None if they are unknown until a dry run.
    optional_inputs: keys that the loss reads if they are present.
    finite: inputs whose values must be finite at positions that count.
    coupling: "sequence" if sequences (or groups) do not depend on each other; "batch" is the default if unknown.
    group_size: number of adjacent rows that form a group (2 for preference pairs, rows 2i and 2i+1).
    preferred_rows: the places in a group of the preferred answers, (0,) for preference pairs; empty if it has none.
    In a sum, a loss of single rows counts only these rows.
    plain_logits: why the loss needs stored logits, found by a dry run; empty if lazy logits work.
    materialises: operations of the loss that store the logits even if they are lazy.
    reads, reads_detached: logit statistics that the loss reads of the same rows, with and without a gradient.
    parts: the losses of a weighted sum; empty for any other loss.
    example_inputs, example_hyperparameters: used to try the loss if generated ones do not suit it.
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
    reads_detached: tuple[Statistic, ...] = ()
    parts: tuple[Part, ...] = ()
    example_inputs: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    example_hyperparameters: Mapping[str, Any] = field(
        default_factory=dict, compare=False
    )  # Any: each loss has its own
    preferred_rows: tuple[int, ...] = ()

    # Any: passes on the arguments of the loss
    def __call__(self, *args: Any, **kwargs: Any) -> LossFnOutput:
        return self.fn(*args, **kwargs)

    @property
    def id(self) -> str:
        """The unique id: `distribution:loss`, `upload:name@<12 of digest>` or `local:name`. It never changes.

        An upload with an owner has the id `upload:owner/name@<12 of digest>`; a sum created in this process has
        `sum:` followed by its terms.
        """
        if self.parts and self.provenance.kind == "local":
            return "sum:" + "+".join(f"{part.weight:.12g}*{part.id}" for part in self.parts)
        if self.provenance.kind == "upload":
            owner = f"{self.provenance.owner}/" if self.provenance.owner else ""
            return f"upload:{owner}{self.name}@{self.digest[:12]}"
        return f"{self.provenance.distribution or 'local'}:{self.name}"

    def from_(self, provenance: Provenance) -> LossSpec:
        """The same loss with another origin."""
        return replace(self, provenance=provenance)

    def bind(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of one call: the defaults, overridden by `config`.

        Raises BadHyperparameter for an unknown name, a missing required one, or a value of the wrong type or range.
        """
        return bind_hyperparameters(self.name, self.hyperparameters, config)


def check_preferred_rows(preferred_rows: tuple[int, ...], group_size: int) -> None:
    """Raise BadLoss if these are not places in a group, or if they are all of them."""
    if any(not 0 <= row < group_size for row in preferred_rows) or len(set(preferred_rows)) == group_size:
        raise BadLoss(
            f"preferred_rows is {tuple(preferred_rows)}, but must be some, and not all, of the places 0 to "
            f"{group_size - 1} in a group"
        )
