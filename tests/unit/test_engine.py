"""The engine's rules, on a fake step model and any mixture of requests."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from captionserve_server.core.engine import CaptionEngine, CaptionTask, Outcome
from captionserve_server.core.errors import ModelFaultError
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions
from captionserve_server.core.search import DecodedCaption, SpecialTokens
from captionserve_server.core.step_model import Candidates, StepBatch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_step_model import END, START, FakeStepModel, logprobs

SPECIAL = SpecialTokens(start=START, end=(END,))
MAX_ROWS = 12
FAULTY = 2

options_strategy = st.builds(
    DecodingOptions,
    num_beams=st.integers(1, 5),
    max_length=st.integers(2, 12),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    early_stopping=st.sampled_from(EARLY_STOPPING_VALUES),
)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the step at which it is abandoned, if ever."""

    options: DecodingOptions
    step: int
    abandoned_at: int | None


arrivals_strategy = st.lists(
    st.builds(
        Arrival,
        options_strategy,
        st.integers(0, 12),
        st.one_of(st.none(), st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=10,
)


def task(key: int, options: DecodingOptions) -> CaptionTask:
    return CaptionTask(key, np.full((2, 3), key, np.float32), options)


def alone(key: int, options: DecodingOptions) -> list[DecodedCaption]:
    engine = CaptionEngine(FakeStepModel(capacity=1), SPECIAL, MAX_ROWS)
    engine.submit(task(key, options))
    while not (ended := engine.step()):
        pass
    outcome = ended[key]
    assert isinstance(outcome, list)
    return outcome


@settings(max_examples=60, deadline=None)
@given(arrivals_strategy, st.integers(1, 4))
def test_every_caption_ends_once_and_does_not_depend_on_its_company(
    arrivals: list[Arrival], capacity: int
) -> None:
    model = FakeStepModel(capacity)
    engine = CaptionEngine(model, SPECIAL, MAX_ROWS)
    finished: dict[Hashable, Outcome] = {}
    abandoned: set[int] = set()
    step = 0
    while step <= 20 or not engine.idle:
        for key, arrival in enumerate(arrivals):
            if arrival.step == step:
                engine.submit(task(key, arrival.options))
            if arrival.abandoned_at == step and arrival.step <= step and key not in finished:
                engine.abandon(key)
                abandoned.add(key)
        ended = engine.step()
        assert not ended.keys() & finished.keys()
        finished |= ended
        assert len(model.histories) <= capacity
        step += 1

    assert model.histories == {}
    assert model.most_rows <= MAX_ROWS
    assert finished.keys() | abandoned == set(range(len(arrivals)))
    assert not finished.keys() & abandoned
    for name, outcome in finished.items():
        assert isinstance(name, int)
        assert outcome == alone(name, arrivals[name].options)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), options_strategy)
def test_scores_follow_from_the_tokens(image: int, options: DecodingOptions) -> None:
    for caption in alone(image, options):
        history: tuple[int, ...] = (START,)
        expected = []
        for token in caption.token_ids:
            expected.append(float(logprobs(image, history)[token]))
            history = (*history, token)
        np.testing.assert_allclose(caption.token_logprobs, expected, rtol=1e-6)
        length = len(caption.token_ids)
        assert np.isclose(caption.score, sum(expected) / length**options.length_penalty, rtol=1e-4)
        assert (caption.finish_reason == "eos") == (caption.token_ids[-1] == END)
        assert length <= options.max_length - 1
        assert END not in caption.token_ids[:-1]


def test_captions_are_admitted_in_their_order() -> None:
    engine = CaptionEngine(FakeStepModel(capacity=1), SPECIAL, MAX_ROWS)
    for key in range(5):
        engine.submit(task(key, DecodingOptions(max_length=3)))
    order: list[Hashable] = []
    while not engine.idle:
        order += engine.step()
    assert order == list(range(5))


def test_abandon_all_frees_every_slot() -> None:
    model = FakeStepModel(capacity=4)
    engine = CaptionEngine(model, SPECIAL, MAX_ROWS)
    for key in range(6):
        engine.submit(task(key, DecodingOptions(max_length=12, num_beams=2)))
    engine.step()
    assert model.histories

    engine.abandon_all()

    assert engine.idle
    assert model.histories == {}


def test_a_caption_without_numbers_fails_alone() -> None:
    class FaultyForOne(FakeStepModel):
        def step(self, batch: StepBatch) -> Candidates:
            candidates = super().step(batch)
            faulty = [self.histories[slot][0] == FAULTY for slot in batch.slots.tolist()]
            candidates.logprobs[np.repeat(faulty, batch.row_counts), 0] = np.nan
            return candidates

    options = DecodingOptions(num_beams=2, max_length=8)
    model = FaultyForOne(capacity=8)
    engine = CaptionEngine(model, SPECIAL, MAX_ROWS)
    for key in range(4):
        engine.submit(task(key, options))
    outcomes: dict[Hashable, Outcome] = {}
    while not engine.idle:
        outcomes |= engine.step()

    assert isinstance(outcomes.pop(FAULTY), ModelFaultError)
    assert outcomes == {key: alone(key, options) for key in range(4) if key != FAULTY}
    assert model.histories == {}


def test_images_are_not_offered_again_before_a_slot_is_free() -> None:
    model = FakeStepModel(capacity=2)
    engine = CaptionEngine(model, SPECIAL, MAX_ROWS)
    for key in range(10):
        engine.submit(task(key, DecodingOptions(max_length=8)))
    while not engine.idle:
        engine.step()
    # All ten at first, of which eight are refused, and each of those once more.
    assert model.offered == 10 + 8
