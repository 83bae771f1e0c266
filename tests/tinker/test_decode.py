"""A tensor of the JSON form is refused with BadData if a field has a wrong type or does not fit the others."""

from __future__ import annotations

from typing import Any

import pytest

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import to_numpy
from tinkerbell_server.api.tinker.decode import MAX_DENSE, json_tensor

SPARSE = {"data": [5], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 0, 1], "sparse_col_indices": [2]}


def test_a_sparse_tensor_becomes_a_dense_one() -> None:
    assert to_numpy(json_tensor("x", SPARSE)).tolist() == [[0, 0, 0], [0, 0, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse_col_indices": None}, "sparse_col_indices are not a list of integers"),
        ({"sparse_col_indices": ["a"]}, "sparse_col_indices are not a list of integers"),
        ({"sparse_col_indices": [[2]]}, "sparse_col_indices are not a list of integers"),
        ({"sparse_col_indices": [2**70]}, "sparse_col_indices are not a list of integers"),
        ({"sparse_crow_indices": [0.5, 0, 1]}, "sparse_crow_indices are not a list of integers"),
        ({"sparse_col_indices": [3]}, "do not fit 1 values in 3 columns"),
        ({"shape": "23"}, "a shape is a list of sizes"),
        ({"shape": [2, None]}, "a shape is a list of sizes"),
        ({"shape": [2]}, "needs two sizes"),
        ({"shape": [2, MAX_DENSE]}, "at most 16,777,216 numbers, zeros included"),
        ({"data": [[5], [1, 2]]}, "ragged"),
    ],
)
def test_a_tensor_with_a_wrong_field_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        json_tensor("data[0]", SPARSE | change)
