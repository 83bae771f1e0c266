"""Hypothesis strategies for request bodies: mostly with the right fields, and with extreme values."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from msgspec import inspect

from tinkerbell_core.types import DTYPES

Named = Mapping[str, st.SearchStrategy[Any]]  # Any: one strategy a field
"""Strategies for fields of these names, which replace those for the types of the fields."""

HARD = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-320, 1e308, -0.0]),
)
words = st.one_of(
    st.sampled_from(
        ["m", "mine", "base", "initial", "cross_entropy", "ppo", "dpo", "twice", "mine@", "@", "upload:mine"]
    ),
    st.sampled_from(
        ["..", "/", "/etc", "~", "~x/y", "a/b", "\0", "ann/m", "x" * 3000, "ﬁ", "\U0001f600", "int64", "float16"]
    ),
    st.text(max_size=20),
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {
        "data": st.binary(max_size=64).map(lambda raw: base64.b64encode(raw).decode()),
        "dtype": st.sampled_from([*DTYPES, "complex64"]),
        "shape": st.lists(st.integers(-2, 9), max_size=3),
    }
)
messages = st.fixed_dictionaries(
    {"role": st.one_of(words, st.just("assistant")), "content": st.one_of(words, junk)},
    optional={"weight": junk, "train": junk, "tool_calls": junk, "name": junk},
)
chats = st.lists(messages, max_size=3)
rows = st.one_of(
    st.lists(st.integers(-1, 300), max_size=6),
    st.text(max_size=12),
    chats,
    st.fixed_dictionaries({"messages": chats}, optional={"tools": junk}),
    st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), st.one_of(words, chats))),
    st.fixed_dictionaries({"model_input": st.one_of(tensors, st.lists(numbers, max_size=4)), "loss_fn_inputs": junk}),
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    tensors,
    junk,
)


# Any: one strategy for each kind of type
def fitting(name: str, kind: inspect.Type, named: Named) -> st.SearchStrategy[Any]:
    """Values that the field of this name and type accepts, and extreme ones."""
    if name in named:
        return named[name]
    match kind:
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType() | inspect.FloatType():
            return numbers
        case inspect.StrType():
            return words
        case inspect.BytesType():
            return st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode())
        case inspect.LiteralType(values=values):
            return st.sampled_from(list(values))
        case inspect.UnionType(types=types):
            return st.one_of([fitting(name, each, named) for each in types])
        case inspect.ListType(item_type=item):
            return st.lists(fitting("", item, named), max_size=4)
        case inspect.VarTupleType(item_type=item):
            return st.lists(fitting("", item, named), max_size=4)
        case inspect.TupleType(item_types=items):
            return st.tuples(*[fitting("", item, named) for item in items])
        case inspect.DictType(value_type=value):
            return st.dictionaries(words, fitting("", value, named), max_size=3)
        case inspect.StructType(cls=struct):
            return bodies(struct, named)
        case _:
            return junk


def bodies(struct: type, named: Named) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that usually decode. They have all required fields; one field in ten has a value of any type."""
    fields = inspect.type_info(struct).fields  # type: ignore[attr-defined]  # a struct's info has them

    def field(each: inspect.Field) -> st.SearchStrategy[Any]:
        fits = fitting(each.name, each.type, named)
        return st.integers(0, 9).flatmap(lambda dice: junk if dice == 0 else fits)

    return st.fixed_dictionaries(
        {each.encode_name: field(each) for each in fields if each.required},
        optional={each.encode_name: field(each) for each in fields if not each.required},
    )
