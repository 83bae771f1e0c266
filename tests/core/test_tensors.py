"""The codec keeps the numbers, dtypes and shapes of tensors, and an error names the tensor that it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import (
    cast,
    check_size,
    from_bytes,
    from_numbers,
    from_numpy,
    from_torch,
    from_value,
    to_bytes,
    to_numpy,
    to_torch,
)
from tinkerbell_core.types import DTYPES, TensorData


@pytest.mark.parametrize("name", DTYPES)
def test_a_torch_tensor_keeps_its_dtype_shape_and_numbers(name: str) -> None:
    tensor = torch.tensor([[1, 0, 3], [0, 5, 6]]).to(getattr(torch, name)).T
    coded = from_torch(tensor)
    assert (coded.dtype, coded.shape) == (name, (3, 2))
    assert torch.equal(to_torch(coded), tensor)
    assert to_numpy(coded).tolist() == tensor.tolist()


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_has_the_bytes_per_element_of_torch(name: str) -> None:
    assert getattr(torch, name).itemsize == DTYPES[name]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1, 1)])
def test_a_tensor_of_any_shape_is_converted(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    assert torch.equal(to_torch(check_size(from_torch(tensor), "x")), tensor)
    assert to_numpy(from_torch(tensor)).shape == shape


def test_a_decoded_tensor_owns_its_memory() -> None:
    coded = from_torch(torch.ones(2))
    to_torch(coded).zero_()
    assert to_torch(coded).tolist() == [1, 1]


def test_a_decoded_array_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        to_numpy(from_numbers([1.0], "x"))[0] = 2


def test_a_tensor_with_a_gradient_is_encoded_without_it() -> None:
    assert to_numpy(from_value(torch.ones(2, requires_grad=True) * 2)).tolist() == [2, 2]


def test_a_big_endian_strided_array_keeps_its_numbers() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2]
    assert to_numpy(from_value(array)).tolist() == [[0, 2], [3, 5]]


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.5, "float32"), ([[1.0, 2.0]], "float32"), ([1, 2], "int64"), ([True], "bool"), (3, "int64")]
)
def test_python_numbers_have_one_dtype_per_kind(value: Any, dtype: str) -> None:
    coded = from_value(value)
    assert (coded.dtype, to_numpy(coded).tolist()) == (dtype, value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, None], "x holds something that is not a number"),
        ([2**64], "x holds something that is not a number"),
        ([[1], [2, 3]], "x is a ragged list"),
        ("one", "x is 'one', but must be numbers"),
        (None, "x is None, but must be numbers"),
    ],
)
def test_a_value_that_is_not_numbers_is_named(value: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        from_numbers(value, "x")


@pytest.mark.parametrize("value", [np.array([1j]), torch.tensor([1j]), np.array(["a"])])
def test_a_dtype_that_the_server_does_not_accept_is_named(value: Any) -> None:
    with pytest.raises(BadData, match=r"a tensor has dtype .*convert it first"):
        from_value(value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorData(b"", "float32", (2,)), r"x has 0 bytes, but float32 \[2\] takes 8 bytes"),
        (TensorData(b"1234", "float32", (-1, -1)), r"x has 4 bytes, but float32 \[-1, -1\]"),
        (TensorData(b"", "load", (0,)), "x has dtype 'load', but must have one of bool"),
    ],
)
def test_a_tensor_whose_bytes_do_not_match_is_named(tensor: TensorData, message: str) -> None:
    with pytest.raises(BadData, match=message):
        check_size(tensor, "x")


def test_a_name_that_is_not_a_torch_dtype_is_refused() -> None:
    with pytest.raises(BadData, match="torch has no dtype 'load'"):
        to_torch(TensorData(b"1234", "load", (1,)))


def test_raw_bytes_must_be_whole_elements() -> None:
    assert from_bytes(to_bytes([[1, 2], [3, 4]], "int32"), "int32", "x").tolist() == [1, 2, 3, 4]
    with pytest.raises(BadData, match="x has 3 bytes, but int32 takes 4 bytes per element"):
        from_bytes(b"123", "int32", "x")


def test_a_cast_keeps_the_numbers() -> None:
    tensor = from_numpy(np.array([1, 2], dtype=np.uint8))
    assert cast(tensor, "uint8") is tensor
    assert cast(tensor, "int64") == from_numbers([1, 2], "x")


def test_numpy_tensors_are_converted_without_torch() -> None:
    code = (
        "import sys, numpy\n"
        "from tinkerbell_core.tensors import from_value, to_numpy\n"
        "to_numpy(from_value(numpy.ones(3))), from_value([1, 2])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
