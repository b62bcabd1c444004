"""Every logits processor against transformers' own, on rows of several captions at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from captionserve_server.core.captions import CaptionPlan, SpecialTokens
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.logits_processors import (
    LOGITS_PROCESSORS,
    RowHistories,
    joined,
)
from captionserve_server.core.search.selection import select, top_tokens
from captionserve_server.core.step_model import RowRequests
from captionserve_server.core.words import WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

SIZE = 12
SPECIAL = SpecialTokens(start=1, end=(0, 2))

plans = st.builds(
    lambda options, bad: CaptionPlan(options, WordTokens(bad=bad)),
    st.builds(
        DecodingOptions,
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.6]),
        no_repeat_ngram_size=st.integers(0, 3),
        min_length=st.integers(0, 8),
        suppress_tokens=st.sampled_from([(), (3, 9)]),
    ),
    st.sampled_from([(), ((4,),), ((5, 6), (0,), (7, 7, 4))]),
)
histories = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=9)


def transformers_scores(plan: CaptionPlan, history: list[int], scores: torch.Tensor) -> Any:
    options, device = plan.options, "cpu"
    processors: Any = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if plan.words.bad:
        bad = [list(run) for run in plan.words.bad]
        processors.append(NoBadWordsLogitsProcessor(bad, list(SPECIAL.end)))
    if options.min_length:
        ends = list(SPECIAL.end)
        processors.append(MinLengthLogitsProcessor(options.min_length, ends, device))
    if options.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(list(options.suppress_tokens), device))
    return processors(torch.tensor([history]), scores[None].clone())[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(plans, histories), min_size=1, max_size=4), st.integers(0, 100))
def test_scores_are_changed_as_transformers_changes_them(
    rows: list[tuple[CaptionPlan, list[int]]], seed: int
) -> None:
    longest = max(len(history) for _, history in rows)
    tokens = np.array([[*history, *[0] * (longest - len(history))] for _, history in rows])
    found = RowHistories(
        plans=[plan for plan, _ in rows],
        caption=np.arange(len(rows)),
        tokens=tokens,
        lengths=np.array([len(history) for _, history in rows]),
        special=SPECIAL,
    )
    applying = [each for each in LOGITS_PROCESSORS if any(each.applies(plan) for plan, _ in rows)]
    edits = joined([each.edits(found) for each in applying])
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), SIZE)).astype(np.float32)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    edited, all_rows = logits.copy(), np.zeros(len(rows), np.int64)
    requests = RowRequests(all_rows, all_rows, all_rows + 1, all_rows == 0, edits)

    select(edited, np.zeros(len(rows), np.float32), requests, top_tokens)

    for (plan, history), before, after in zip(rows, logits, edited, strict=True):
        expected = transformers_scores(plan, history, torch.from_numpy(before))
        np.testing.assert_allclose(after, expected.numpy(), rtol=1e-6)
