"""Errors cross Triton as text and come back as themselves."""

from __future__ import annotations

import pytest
from captionserve_server.core.errors import (
    CaptionServeError,
    InvalidFramingError,
    InvalidOptionsError,
    all_error_types,
)
from captionserve_server.triton.wire import error_of_text, error_text


def example(error_type: type[CaptionServeError]) -> CaptionServeError:
    if issubclass(error_type, (InvalidFramingError, InvalidOptionsError)):
        return error_type({"num_beams": "must be 1 to 16, is 0"})
    return error_type("something is wrong")


@pytest.mark.parametrize("error_type", all_error_types())
def test_every_error_survives_the_wire(error_type: type[CaptionServeError]) -> None:
    error = example(error_type)
    back = error_of_text(error_text(error))
    assert type(back) is error_type
    assert back.message == error.message
    assert back.field_violations == error.field_violations


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in ensemble 'x': failed",
        "[]",
        "{}",
        '{"reason": "NOT_OURS", "message": "x"}',
        '{"reason": "INTERNAL", "message": 5}',
        '{"reason": ["INTERNAL"], "message": "x"}',
        '{"reason": "INVALID_OPTIONS", "message": "x", "field_violations": 3}',
        '{"reason": "INVALID_OPTIONS", "message": "x", "field_violations": {"a": 3}}',
    ],
)
def test_other_text_is_not_taken_for_an_error_of_ours(text: str) -> None:
    assert error_of_text(text) is None
