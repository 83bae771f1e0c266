from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tinker_client.encoding import packed, tensor_data, to_numpy
from tinkerbell_core.errors import BadData
from tinkerbell_core.types import TensorData


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.float16, torch.bfloat16]
)
def test_torch_tensors_keep_dtype_shape_and_numbers(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 3], [0, 5, 6]]).to(dtype)
    coded = tensor_data(tensor.T)
    assert (coded.dtype, coded.shape) == (str(dtype).removeprefix("torch."), (3, 2))
    assert to_numpy(coded).tolist() == tensor.T.tolist()


def test_a_tensor_with_a_gradient_is_sent_without_it() -> None:
    assert to_numpy(tensor_data(torch.ones(2, requires_grad=True) * 2)).tolist() == [2, 2]


def test_lists_of_floats_are_float32() -> None:
    assert tensor_data([[1.0, 2.0]]) == tensor_data(np.array([[1, 2]], dtype=np.float32))


def test_tensors_anywhere_in_a_message_become_tensor_data() -> None:
    message: Any = {"rows": [torch.tensor([1]), np.array([2.5]), MappingProxyType({"x": np.float32(1.5)}), [3, 4]]}
    first, second, third, fourth = msgspec.msgpack.decode(packed(message))["rows"]
    assert msgspec.convert(first, TensorData) == tensor_data(torch.tensor([1]))
    assert second["dtype"] == "float64"
    assert (third, fourth) == ({"x": 1.5}, [3, 4])


def test_big_endian_and_strided_arrays_arrive_as_they_read() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2]
    assert to_numpy(tensor_data(array)).tolist() == [[0, 2], [3, 5]]


@pytest.mark.parametrize("value", [np.array([1j]), torch.tensor([1j]), np.array(["a"])])
def test_a_dtype_the_server_does_not_take_is_named(value: Any) -> None:
    with pytest.raises(BadData, match=r"a tensor has dtype .*convert it first"):
        tensor_data(value)


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(BadData, match=r"a builtins.object cannot be sent"):
        packed({"data": object()})
