"""The tree of errors."""

from __future__ import annotations

import grpc
from captionserve_server.core.errors import (
    InvalidOptionsError,
    InvalidRequestError,
    all_error_types,
    shortened,
)
from captionserve_server.core.options import OPTIONS
from captionserve_server.gateway.status import rpc_status
from captionserve_server.triton.wire import error_of_text, error_text
from hypothesis import example, given
from hypothesis import strategies as st

MOST_BYTES = 4096
anything = st.text(st.characters())


def test_reasons_are_unique() -> None:
    reasons = [error_type.reason for error_type in all_error_types()]
    assert len(reasons) == len(set(reasons))


@given(anything, st.integers(3, 80))
@example("\ud800" * 50, 60)
@example("\U0001f600" * 50, 60)
def test_what_is_shortened_begins_as_the_text_and_can_be_sent(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short.encode()) <= most
    whole = text.encode(errors="backslashreplace").decode()
    assert short == whole or whole.startswith(short.removesuffix("..."))


def percent_encoded_bytes(text: str) -> int:
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


@given(
    st.dictionaries(anything, anything, min_size=1)
    | st.builds(lambda t: {t * 999: t * 9999}, anything)
)
@example(dict.fromkeys(OPTIONS, "x" * 5000))
@example(dict.fromkeys(map(str, range(10_000)), "\U0001f600"))
@example({"a" * 100_000: "\0" * 100_000})
def test_no_status_is_longer_than_4_kib(violations: dict[str, str]) -> None:
    for error in (InvalidOptionsError(violations), InvalidRequestError("".join(violations))):
        status = rpc_status(error)
        details = dict(status.trailing_metadata)["grpc-status-details-bin"]
        # In base64, beside the message in percent-encoding.
        sent = 4 * (len(details) + 2) // 3 + percent_encoded_bytes(status.message)
        assert sent <= MOST_BYTES
        assert status.code is grpc.StatusCode.INVALID_ARGUMENT
        text = error_text(error)
        assert len(text) <= MOST_BYTES
        known = error_of_text(text)
        assert known is not None
        assert known.field_violations == error.field_violations


def test_every_option_can_be_named_in_one_error() -> None:
    violations = dict.fromkeys(OPTIONS, "must be 1 to 16, is something else altogether")
    assert InvalidOptionsError(violations).field_violations.keys() == OPTIONS.keys()
