"""Views and indexing of lazy logits equal those of stored logits, and store nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.naive import StoredSource
from tinkerbell_core.logits import Logits

B, T, H, V = 4, 6, 5, 64
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.5
SOME = torch.tensor([[1, 5, 2], [0, 0, 3]])

VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(-1, V),
    "view as a tuple": lambda x: x.view((2, 2, T, V)),
    "view with the vocabulary left out": lambda x: x.view(B * T, -1),
    "view as": lambda x: x.view_as(torch.empty(B * T, V)),
    "view as itself": lambda x: x[0].view_as(x[1]),
    "reshape": lambda x: x[:, 1:].reshape(-1, V),
    "reshape by size": lambda x: torch.reshape(x, (B * T, x.size(-1))),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten to the front": lambda x: x.flatten(end_dim=-2),
    "unflatten": lambda x: x.unflatten(0, (2, -1)),
    "contiguous": lambda x: x[..., :-1, :].contiguous().view(-1, V),
    "a copy after arithmetic": lambda x: (x[:, :-1] * 2).view(-1, V),
    "transpose": lambda x: x.transpose(0, 1),
    "transpose the vocabulary": lambda x: x.transpose(1, 2),
    "transpose there and back": lambda x: x.transpose(1, 2).transpose(1, 2),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(2, 0, 1),
    "permute by a list": lambda x: x.permute([1, 2, 0]),
    "movedim": lambda x: torch.movedim(x, -1, 0),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "t": lambda x: x[0].t(),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze at the end": lambda x: x.unsqueeze(-1),
    "unsqueeze before the vocabulary": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:1].squeeze(),
    "squeeze a dimension": lambda x: x[:, None].squeeze(1),
    "squeeze nothing": lambda x: x.squeeze(1),
    "squeeze after the vocabulary": lambda x: x.unsqueeze(-1).squeeze(-1),
    "expand": lambda x: x[:, :1].expand(B, T, V),
    "expand with more dimensions": lambda x: x.expand(2, -1, -1, -1),
    "broadcast to": lambda x: torch.broadcast_to(x, (2, B, T, V)),
    "expand as": lambda x: x[:1].expand_as(x),
    "split": lambda x: x.split(3),
    "split by sizes": lambda x: torch.split(x, [1, 5], dim=1),
    "split the transposed": lambda x: x.transpose(1, 2).split(2, -1),
    "chunk": lambda x: x.chunk(2, 1),
    "tensor_split": lambda x: x.tensor_split(3),
    "unbind": lambda x: x.unbind(),
    "unbind positions": lambda x: torch.unbind(x, dim=1),
    "iteration": lambda x: list(x),
    "unpacking": lambda x: (lambda a, b, *rest: (b, a))(*x),
    "select": lambda x: x.select(1, -1),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 3, 0])),
    "cat": lambda x: torch.cat([x[1:], x[:1]], 0),
    "cat of positions": lambda x: torch.cat((x[:, 3:], x[:, :3]), dim=1),
    "cat at scales": lambda x: torch.cat([x[:2] * 2, x[2:] + 1]),
    "stack": lambda x: torch.stack([x[0], x[3]]),
    "stack after": lambda x: torch.stack([x[0], x[3]], dim=1),
}

KEYS: dict[str, Any] = {
    "a row": 1,
    "a row from the end": -1,
    "a slice": slice(1, 3),
    "every second": (slice(None), slice(None, None, 2)),
    "shifted": (slice(None), slice(None, -1)),
    "shifted by an ellipsis": (Ellipsis, slice(1, None), slice(None)),
    "the last position": (slice(None), -1),
    "one position": (2, 3),
    "a new dimension": (None, 1),
    "a new dimension inside": (slice(None), None, slice(2, 4)),
    "a new dimension between": (slice(None), slice(None), None),
    "nothing": (),
    "all": Ellipsis,
    "a mask": MASK,
    "a mask of sequences": MASK[:, 0],
    "a mask of positions": (slice(None), MASK[0]),
    "rows by numbers": torch.tensor([3, 1, 1]),
    "rows by a list": [0, 2],
    "pairs of numbers": (torch.arange(B), torch.tensor([1, 0, 5, 2])),
    "numbers in two dimensions": (slice(None), SOME),
    "numbers and a slice": (torch.tensor([0, 2])[:, None], SOME),
    "a column": (Ellipsis, 7),
    "a column from the end": (slice(None), slice(None), -2),
    "a column of one row": (0, 0, 5),
    "columns by a list": (Ellipsis, [3, 5]),
    "columns by a tensor": (slice(None), slice(None), SOME),
    "columns from the end": (Ellipsis, torch.tensor([-1, -64])),
    "columns by a slice": (slice(None), 2, slice(3, 9)),
    "columns by a mask": (Ellipsis, torch.arange(V) % 20 == 1),
    "columns of a mask of rows": (MASK, 4),
    "rows and columns": (torch.arange(B), torch.tensor([1, 0, 5, 2]), torch.tensor([7, 8, 9, -1])),
    "rows and columns broadcast": (torch.arange(B)[:, None], torch.arange(T), torch.arange(B * T).view(B, T)),
    "a slice between": (torch.tensor([1, 2]), slice(None), torch.tensor([5, 6])),
    "positions and columns": (slice(None), torch.tensor([1, 2]), torch.tensor([5, 6])),
    "a number before": (1, torch.arange(T), torch.arange(T)),
    "a number between": (torch.tensor([1, 2]), 0, torch.tensor([5, 6])),
    "a mask and its columns": (MASK, torch.arange(int(MASK.sum()))),
    "a number and columns": (0, slice(None), torch.tensor([1, 2])),
}


@pytest.fixture
def pair() -> tuple[Logits, Tensor]:
    g = torch.Generator().manual_seed(1)
    source = StoredSource(torch.randn(B * T, H, generator=g), torch.randn(V, H, generator=g))
    return Logits.over(source, (B, T)), source.full(torch.arange(B * T)).view(B, T, V)


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
        return
    assert found.shape == expected.shape
    true = found.stored("the test") if isinstance(found, Logits) else found
    torch.testing.assert_close(true, expected)


@pytest.mark.parametrize("form", ["logits", "log-probabilities", "scaled"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_equals_that_of_stored_logits(name: str, form: str, pair: tuple[Logits, Tensor]) -> None:
    lazy, plain = pair
    row = torch.rand(B, T, 1) + 0.5
    before = {
        "logits": lambda x: x,
        "log-probabilities": lambda x: x.log_softmax(-1) * row + row,
        "scaled": lambda x: x * row - 1,
    }[form]
    found = VIEWS[name](before(lazy))
    assert lazy.materialised == []
    same(found, VIEWS[name](before(plain)))


@pytest.mark.parametrize("name", KEYS)
def test_an_index_equals_that_of_stored_logits(name: str, pair: tuple[Logits, Tensor]) -> None:
    lazy, plain = pair
    found = lazy.softmax(-1)[KEYS[name]]
    assert lazy.materialised == []
    same(found, plain.softmax(-1)[KEYS[name]])


@pytest.mark.parametrize(
    "key",
    [
        (Ellipsis, None),
        (Ellipsis, slice(None, None, 2)),
        (torch.rand(B, T, V) > 0.5,),
        (torch.tensor(True),),
        (Ellipsis, torch.arange(V)),
    ],
)
def test_an_index_without_a_rule_equals_that_of_stored_logits(key: Any, pair: tuple[Logits, Tensor]) -> None:
    lazy, plain = pair
    same(lazy[key], plain[key])


def test_softmaxes_follow_the_vocabulary(pair: tuple[Logits, Tensor]) -> None:
    lazy, plain = pair
    found = lazy.permute(2, 0, 1).log_softmax(0).logsumexp(0)
    picked = lazy.transpose(1, 2).softmax(1).gather(1, torch.full((B, 1, T), 3))
    largest = lazy.transpose(1, 2).max(1, keepdim=True)
    assert lazy.materialised == []
    torch.testing.assert_close(found, torch.zeros(B, T), atol=1e-6, rtol=0)
    torch.testing.assert_close(picked, plain.transpose(1, 2).softmax(1)[:, 3:4])
    torch.testing.assert_close(largest.indices, plain.transpose(1, 2).max(1, keepdim=True).indices)
    same(lazy.softmax(1), plain.softmax(1))
    assert lazy.materialised
