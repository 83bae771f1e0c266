"""Regroups the chunks into which the SDK splits a call, for losses that couple rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tinkerbell_core.errors import BadData, BadRequest
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import ForwardRequest, LossDescription
from tinkerbell_server.api.tinker.decode import ForwardCall, config_of
from tinkerbell_server.api.tinker.store import Run

GROUP_ID = "group_id"
"""An input with one integer for each row: rows with the same integer belong together."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a call whose loss couples rows. groups: the `group_id` of each row, if they were sent."""

    run: Run
    call: ForwardCall
    loss: LossDescription
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


def couples_rows(loss: LossDescription, call: ForwardCall) -> bool:
    """Whether this call must see all of its rows at once, or all rows of a group."""
    return loss.coupling == "batch" or loss.group_size > 1 or call.config.get("aggregation", "sum") != "sum"


def take_groups(loss: LossDescription, call: ForwardCall) -> tuple[int, ...] | None:
    """Remove the `group_id` from each datum, unless the loss reads it; the ids, if they were sent. Raises BadData."""
    if loss.reads(GROUP_ID) or not any(GROUP_ID in datum["loss_fn_inputs"] for datum in call.data):
        return None
    groups = []
    for index, datum in enumerate(call.data):
        sent = datum["loss_fn_inputs"].pop(GROUP_ID, None)
        ids = None if sent is None else to_numpy(sent).reshape(-1)
        if ids is None or ids.size == 0 or ids.dtype.kind != "i" or (ids != ids[0]).any():
            raise BadData(f"data[{index}]: {GROUP_ID!r} must be one integer, and every row needs it if one row has it")
        groups.append(int(ids[0]))
    return tuple(groups)


def forward_request(run: Run, calls: Sequence[ForwardCall], loss: LossDescription) -> ForwardRequest:
    """The rows of all these chunks, as one request."""
    return ForwardRequest(
        model_id=run.id,
        data=[datum for call in calls for datum in call.data],
        loss_fn=loss.id,
        loss_fn_config={**config_of(loss, calls[0].config)},
    )


def calls_of(chunks: Sequence[Chunk], doubt: str | None) -> list[int]:
    """The number of chunks in each call, for consecutive chunks that may continue one another. Usually all are one.

    doubt: why the chunks may not be one call. Then, and if every row has a `group_id`, the groups decide: chunks that
    share a group are one call. Raises BadRequest if nothing decides, or if a group is incomplete.
    """
    groups = [chunk.groups for chunk in chunks if chunk.groups is not None]
    loss = chunks[0].loss
    if doubt == MISSING and chunks[0].batch:
        # groups can be counted, but a batch has no known size
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


MISSING = "a request before these rows did not arrive, and it may hold the rest of their call"

TORN = "a request behind these rows has arrived, but not those in between, which may hold the rest of their call"

SEVERAL = "several requests with it arrived together behind another, and they may be one call or many"


def _check_whole(loss: LossDescription, groups: Sequence[int]) -> None:
    """Check that the rows of each group are consecutive and as many as the loss takes. Raises BadData."""
    size = loss.group_size
    if size < 2:
        return
    found = Counter(groups)
    for start in range(0, len(groups), size):
        group = groups[start]
        if found[group] != size or set(groups[start : start + size]) != {group}:
            raise BadData(
                f"loss {loss.name!r} takes rows in groups of {size}, each of one {GROUP_ID!r}, but group {group} "
                f"has {found[group]} rows, or they are not consecutive: send all rows of a group one after the other "
                "(see docs/coming-from-tinker.md#what-is-added)"
            )
