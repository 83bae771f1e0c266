"""The table of fields of the OpenAI API agrees with the structs that the server decodes."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from tinkerbell_server.api.openai.bodies import Body, ChatCompletion, Completion
from tinkerbell_server.api.openai.fields import BOTH, FIELDS, Route, check_fields, fields_of
from tinkerbell_server.http.openai_errors import OpenAIError


@pytest.mark.parametrize(("route", "type_"), [("completions", Completion), ("chat/completions", ChatCompletion)])
def test_the_fields_of_a_body_are_those_that_the_table_honours(route: Route, type_: type[Body]) -> None:
    honoured = {name for name, field in fields_of(route).items() if field.neutral is None}
    assert honoured == {field.name for field in msgspec.structs.fields(type_)}


def test_a_field_is_once_in_the_table_for_each_route() -> None:
    for route in BOTH:
        assert Counter(field.name for field in FIELDS if route in field.routes).most_common(1)[0][1] == 1


@pytest.mark.parametrize("route", BOTH)
def test_a_refused_field_accepts_null_and_neutral_values_alone(route: Route) -> None:
    for name, field in fields_of(route).items():
        if field.neutral is None:
            continue
        for value in (None, *field.neutral):
            assert check_fields({name: value}, route) == {}
        with pytest.raises(OpenAIError, match=f"^{name} is '12345', which this server does not support: ") as raised:
            check_fields({name: 12345}, route)
        assert (raised.value.param, raised.value.code) == (name, "unsupported_parameter")


def test_an_unknown_field_is_refused_with_a_similar_name() -> None:
    with pytest.raises(OpenAIError, match="did you mean 'max_tokens'") as raised:
        check_fields({"max_token": 5}, "completions")
    assert (raised.value.param, raised.value.code) == ("max_token", "unknown_parameter")
