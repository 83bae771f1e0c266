"""Which chunks are one call of a loss that sees its rows together. Nothing on the wire says so. Knows no queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tinkerbell_core.errors import BadData, BadRequest
from tinkerbell_core.types import ForwardRequest, LossDescription
from tinkerbell_server.api.tinker.decode import ForwardCall, config_of
from tinkerbell_server.api.tinker.store import Run
from tinkerbell_server.calls.tensors import as_array
from tinkerbell_server.commands import EngineDescription

GROUP_ID = "group_id"
"""The input, an integer a row, by which a client says which rows belong together."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a loss that couples its rows. groups: the `group_id` of each row, where they were sent."""

    run: Run
    call: ForwardCall
    loss: LossDescription
    engine: EngineDescription
    groups: tuple[int, ...] | None = None

    @property
    def batch(self) -> bool:
        """Whether every row is coupled with every other, not only those of a group."""
        return self.loss.coupling == "batch" or self.call.config.get("aggregation", "sum") != "sum"

    def continues(self, other: Chunk | None) -> bool:
        return (
            other is not None
            and (self.loss.id, self.call.backward) == (other.loss.id, other.call.backward)
            and self.call.config == other.call.config
        )


def couples(loss: LossDescription, call: ForwardCall) -> bool:
    """Whether this loss, called so, may not be run on a part of its rows."""
    return loss.coupling == "batch" or loss.group_size > 1 or call.config.get("aggregation", "sum") != "sum"


def take_groups(loss: LossDescription, call: ForwardCall) -> tuple[int, ...] | None:
    """Take the `group_id` out of each datum of a loss that does not read it itself. Raises BadData."""
    if loss.reads(GROUP_ID) or not any(GROUP_ID in datum["loss_fn_inputs"] for datum in call.data):
        return None
    groups = []
    for index, datum in enumerate(call.data):
        sent = datum["loss_fn_inputs"].pop(GROUP_ID, None)
        ids = None if sent is None else as_array(sent).reshape(-1)
        if ids is None or ids.size == 0 or ids.dtype.kind != "i" or (ids != ids[0]).any():
            raise BadData(f"data[{index}]: {GROUP_ID!r} must be one integer, and of every row where one row has it")
        groups.append(int(ids[0]))
    return tuple(groups)


def forward_request(run: Run, calls: Sequence[ForwardCall], loss: LossDescription) -> ForwardRequest:
    """The rows of all these chunks, as one request."""
    return ForwardRequest(
        model_id=run.model_id,
        data=[datum for call in calls for datum in call.data],
        loss_fn=loss.id,
        loss_fn_config={**config_of(loss, calls[0].config)},
    )


def calls_of(chunks: Sequence[Chunk], doubt: str | None) -> list[int]:
    """How many of these consecutive chunks, each continuing the one before, are each call: all of them are one.

    doubt: why they may be something else. Then, and wherever each row has a `group_id`, those alone say it: chunks
    that share a group are one call. Raises BadRequest where nothing says it, or where a group is not whole.
    """
    groups = [chunk.groups for chunk in chunks if chunk.groups is not None]
    loss = chunks[0].loss
    if doubt == MISSING and chunks[0].batch:
        # what came may be whole groups, but a batch has no size that would tell
        raise BadRequest(f"loss {loss.name!r} sees its whole batch, and {doubt}; send the call again")
    if len(groups) < len(chunks):
        if doubt is None:
            return [len(chunks)]
        raise BadRequest(
            f"loss {loss.name!r} sees rows together, and {doubt}; send the call again, one call at a time, or give "
            f"each row the input {GROUP_ID!r}: one integer, the same for rows that belong together"
        )
    counts: list[int] = []
    seen: set[int] = set()
    for own in groups:
        if counts and seen & set(own):
            counts[-1] += 1
            seen |= set(own)
        else:
            counts.append(1)
            seen = set(own)
    start = 0
    for count in counts:
        _check_whole(loss, [group for own in groups[start : start + count] for group in own])
        start += count
    return counts


MISSING = "a request before these rows never came, which may have been the rest of their call"

TORN = "a request behind these rows has come, but not those in between, which may be the rest of their call"

SEVERAL = "several requests of it came at once behind another, which may be one call or many"


def _check_whole(loss: LossDescription, groups: Sequence[int]) -> None:
    """Rows of one group stand together, and are as many as the loss takes. Raises BadData."""
    size = loss.group_size
    if size < 2:
        return
    found = Counter(groups)
    for start in range(0, len(groups), size):
        group = groups[start]
        if found[group] != size or set(groups[start : start + size]) != {group}:
            raise BadData(
                f"loss {loss.name!r} takes rows in groups of {size}, each of one {GROUP_ID!r}, but group {group} "
                f"has {found[group]} rows here, or not side by side: send each group whole, row by row"
            )
