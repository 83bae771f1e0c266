"""What the server publishes of its losses and plugins."""

from __future__ import annotations

from typing import Literal

from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.spec import LossSpec, Part, Provenance
from tinkerbell_core.types.wire import Wire


class LossDescription(Wire, frozen=True):
    """A LossSpec without its function.

    inputs: required keys. optional_inputs: keys that the loss reads if they are sent. plain_logits: why the loss gets
    stored logits; empty if it gets lazy ones. materialises: operations of the loss that store the logits even if they
    are lazy. parts: the losses of a weighted sum. preferred_rows: the places of the preferred answers in a group.
    """

    id: str
    name: str
    summary: str
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    coupling: Literal["sequence", "batch"]
    group_size: int
    finite: tuple[str, ...]
    provenance: Provenance
    digest: str
    source: str = ""
    plain_logits: str = ""
    materialises: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    preferred_rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: LossSpec) -> LossDescription:
        """Describe a spec whose inputs are declared or discovered."""
        return cls(
            id=spec.id,
            name=spec.name,
            summary=spec.summary,
            inputs=spec.inputs or (),
            optional_inputs=spec.optional_inputs,
            hyperparameters=spec.hyperparameters,
            coupling=spec.coupling,
            group_size=spec.group_size,
            finite=spec.finite,
            provenance=spec.provenance,
            digest=spec.digest,
            source=spec.source,
            plain_logits=spec.plain_logits,
            materialises=spec.materialises,
            parts=spec.parts,
            preferred_rows=spec.preferred_rows,
        )

    @property
    def logits(self) -> str:
        """How the loss gets its logits, in words."""
        if self.plain_logits:
            return f"stored: {self.plain_logits}"
        return f"stored by {', '.join(self.materialises)}" if self.materialises else "lazy"

    def reads(self, key: str) -> bool:
        """Whether the loss reads this input."""
        return key in self.inputs or key in self.optional_inputs


class PluginDescription(Wire, frozen=True):
    """One entry point: its distribution and version, the ids of its losses, and the reason if it is broken."""

    id: str
    distribution: str
    version: str
    losses: tuple[str, ...] = ()
    error: str | None = None
