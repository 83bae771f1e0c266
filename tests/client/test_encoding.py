"""A request is encoded with its tensors, and an error names a value that cannot be sent."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tinker_client.encoding import encode
from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import from_value
from tinkerbell_core.types import TensorData


def test_tensors_anywhere_in_a_message_become_tensor_data() -> None:
    message: Any = {"rows": [torch.tensor([1]), np.array([2.5]), MappingProxyType({"x": np.float32(1.5)}), [3, 4]]}
    first, second, third, fourth = msgspec.msgpack.decode(encode(message))["rows"]
    assert msgspec.convert(first, TensorData) == from_value(torch.tensor([1]))
    assert second["dtype"] == "float64"
    assert (third, fourth) == ({"x": 1.5}, [3, 4])


def test_the_type_of_a_value_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(BadData, match=r"a builtins.object cannot be sent"):
        encode({"data": object()})
