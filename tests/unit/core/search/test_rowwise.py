"""What sampling draws: its distribution, and that nothing but seed and row number decides it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from captionserve_server.core.captions import CaptionPlan, SpecialTokens
from captionserve_server.core.engine.scheduler import Request, Scheduler, SchedulerLimits
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.search.rowwise import warped_shares
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.unit.core.fake_step_model import (
    END,
    START,
    VOCABULARY_SIZE,
    FakeEncoder,
    FakeStepModel,
    logprobs,
    pixels_of,
)

DRAWS = 20_000
PER_CAPTION = 16
IMAGE = 3
VOCABULARY = Vocabulary(SpecialTokens(START, (END,)), VOCABULARY_SIZE)
# Beyond this a right sampler lands once in ten thousand runs; the seeds here are fixed.
HIGHEST_P_VALUE_REFUSED = 1e-4


def expected_distribution(options: DecodingOptions) -> torch.Tensor:
    """Transformers' own warpers over the fake's first token; float64 [VOCABULARY_SIZE]."""
    warpers = LogitsProcessorList()
    warpers.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logprobs(IMAGE, (START,)).astype(np.float64))[None]
    unused: Any = torch.zeros(1, 1, dtype=torch.long)
    warped: Any = scores
    return torch.softmax(warpers(unused, warped), dim=-1)[0]


def first_tokens(options: DecodingOptions) -> Counter[int]:
    """The first tokens of many captions, each of its own seed, 16 rows to a caption."""
    limits = SchedulerLimits(max_rows=1024, max_admissions=64)
    engine = Scheduler(FakeEncoder(), FakeStepModel(capacity=64), VOCABULARY, limits)
    for seed in range(DRAWS // PER_CAPTION):
        plan = CaptionPlan(dataclasses.replace(options, seed=seed))
        engine.submit(Request(seed, pixels_of(IMAGE), plan))
    found: Counter[int] = Counter()
    while not engine.idle:
        for outcome in engine.step().values():
            assert isinstance(outcome, list)
            found.update(caption.token_ids[0] for caption in outcome)
    return found


def chi_square_p_value(found: Counter[int], expected: torch.Tensor) -> float:
    """The chance that a right sampler is as far off, by the chi-square distribution."""
    tokens = torch.nonzero(expected > 0)[:, 0].tolist()
    counts = torch.tensor([float(found[token]) for token in tokens], dtype=torch.float64)
    means = expected[tokens] * DRAWS
    # Rare tokens share a bin, so that the distribution is nearly normal in each.
    rare = means < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        means = torch.cat((means[~rare], means[rare].sum()[None]))
    statistic = ((counts - means) ** 2 / means).sum()
    freedom = torch.tensor(max(len(means) - 1, 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize(
    "warps",
    [
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "temperature": 0.6},
        {"top_k": 0, "min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "temperature": 1.4, "min_p": 0.05},
    ],
    ids=str,
)
def test_first_tokens_are_distributed_as_transformers_warps_them(
    warps: dict[str, float],
) -> None:
    options = DecodingOptions(
        do_sample=True,
        max_length=2,
        num_return_sequences=PER_CAPTION,
        **warps,  # type: ignore[arg-type]
    )
    expected = expected_distribution(options)
    found = first_tokens(options)
    assert sum(found.values()) == DRAWS
    assert all(expected[token] > 0 for token in found)
    assert chi_square_p_value(found, expected) > HIGHEST_P_VALUE_REFUSED


def test_the_chi_square_test_refuses_a_wrong_sampler() -> None:
    found = first_tokens(
        DecodingOptions(
            do_sample=True, max_length=2, num_return_sequences=PER_CAPTION, top_k=0, temperature=1.1
        )
    )
    expected = expected_distribution(DecodingOptions(do_sample=True, top_k=0))
    assert chi_square_p_value(found, expected) < HIGHEST_P_VALUE_REFUSED


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.2, 3.0),
    st.integers(0, VOCABULARY_SIZE),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_shares_equal_transformers_warpers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = DecodingOptions(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    scores = logprobs(IMAGE, (START,)).astype(np.float64)
    order = np.argsort(-scores)
    shares = warped_shares(scores[order][None, None], [options])[0, 0]
    expected = expected_distribution(options).numpy()[order]
    np.testing.assert_allclose(shares / shares.sum(), expected, atol=1e-9)


def test_seeds_and_rows_draw_differently_and_repeat_themselves() -> None:
    def captions(seed: int | None) -> list[tuple[int, ...]]:
        options = DecodingOptions(
            do_sample=True, seed=seed, max_length=12, num_return_sequences=4, top_k=0
        )
        engine = Scheduler(FakeEncoder(), FakeStepModel(capacity=1), VOCABULARY, SchedulerLimits())
        engine.submit(Request(0, pixels_of(IMAGE), CaptionPlan(options)))
        while not (ended := engine.step()):
            pass
        outcome = ended[0]
        assert isinstance(outcome, list)
        return [caption.token_ids for caption in outcome]

    assert captions(5) == captions(5)
    assert len({*captions(5), *captions(6)}) == 8
    assert captions(None) != captions(None)
    assert captions(2**63 - 1) == captions(2**63 - 1)
