"""What a step costs follows from its rows, not from how much an option holds.

Counted in bytecodes, which are the same on every machine: a loop over words, tokens or banned runs
for each row shows in them. What arrays cost is measured by bench/step_cost.py.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import ForcedWord, WordTokens

from tests.unit.core.search.search_run import Run

STEPS = 4
BEAMS = 16
MOST_LENGTH = 128


def plan(words: WordTokens | None = None, **options: Any) -> CaptionPlan:
    asked = DecodingOptions(num_beams=BEAMS, max_length=MOST_LENGTH, min_length=40, **options)
    return CaptionPlan(asked, words or WordTokens())


def bytecodes(plan: CaptionPlan) -> int:
    """How many the search itself takes for a few steps."""
    counted = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal counted
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counted += event == "opcode"
        return trace

    run = Run([plan])
    run.advance()
    before = sys.gettrace()
    for _ in range(STEPS):
        step, answer = run.ask()
        sys.settrace(trace)
        try:
            run.search.step()
            run.search = step.advance(answer)
        finally:
            sys.settrace(before)
    return counted


def forced(count: int) -> CaptionPlan:
    # Tokens that the model seldom takes, so that no word is met meanwhile.
    words = tuple(ForcedWord((10 + n % 28, 10 + n // 28), (10 + n % 28,) * 2) for n in range(count))
    return plan(WordTokens(forced=words), force_words=("stand-in",))


def banned(count: int) -> CaptionPlan:
    runs = tuple((*range(10, 10 + n % 28), 10 + n // 28, 5) for n in range(count))
    return plan(WordTokens(bad=runs), bad_words=("stand-in",))


@pytest.mark.parametrize(
    ("few", "most"),
    [
        (forced(1), forced(62)),
        (banned(1), banned(128)),
        (plan(suppress_tokens=(9,)), plan(suppress_tokens=(9,) * 256)),
        (plan(no_repeat_ngram_size=1), plan(no_repeat_ngram_size=64)),
    ],
    ids=["force_words", "bad_words", "suppress_tokens", "no_repeat_ngram_size"],
)
def test_a_step_takes_no_longer_for_more_of_an_option(few: CaptionPlan, most: CaptionPlan) -> None:
    assert bytecodes(most) < 1.2 * bytecodes(few)


def test_forced_words_take_at_most_three_times_the_work_of_plain_beams() -> None:
    assert bytecodes(forced(62)) < 3 * bytecodes(plan())
