"""The scheduler's rules, on a fake step model and any mixture of requests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.captions import CaptionPlan, DecodedCaption, SpecialTokens
from captionserve_server.core.engine.scheduler import (
    Outcome,
    Request,
    Scheduler,
    SchedulerLimits,
)
from captionserve_server.core.errors import InvalidOptionsError, ModelFaultError
from captionserve_server.core.history import HistoryStep
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions
from captionserve_server.core.search import Search, SearchStep, Vocabulary
from captionserve_server.core.step_model import (
    Float32Array,
    ForcedRows,
    ImageEncoder,
    Int64Array,
    StepAnswer,
    StepBatch,
    UInt8Array,
)
from captionserve_server.core.words import ForcedWord, WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.core.fake_step_model import (
    END,
    NO_IMAGE,
    START,
    VOCABULARY_SIZE,
    FakeEncoder,
    FakeStepModel,
    logprobs,
    pixels_of,
)

VOCABULARY = Vocabulary(SpecialTokens(start=START, end=(END,)), VOCABULARY_SIZE)
MAX_ROWS = 12
MAX_ENTRIES = 120
LIMITS = SchedulerLimits(max_rows=MAX_ROWS, max_entries=MAX_ENTRIES, max_admissions=2)
FAULTY = 2

lengths = st.integers(8, 12)
penalties = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
prefixes = st.sampled_from([(), (), (5,), (7, 3)])
common = {
    "max_length": lengths,
    "length_penalty": penalties,
    "min_length": st.integers(0, 6),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 0.7, 1.6]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "suppress_tokens": st.sampled_from([(), (), (4, 9)]),
    "output_attentions": st.booleans(),
    "output_grounding": st.booleans(),
}
reranks = st.sampled_from(["likelihood", "likelihood", "grounding"])
greedy = st.builds(DecodingOptions, **common)
beams = st.builds(
    DecodingOptions,
    num_beams=st.integers(2, 5),
    early_stopping=st.sampled_from(EARLY_STOPPING_VALUES),
    num_return_sequences=st.integers(1, 2),
    rerank=reranks,
    **common,
)
groups = st.builds(
    DecodingOptions,
    num_beams=st.sampled_from([4]),
    num_beam_groups=st.sampled_from([2, 4]),
    diversity_penalty=st.sampled_from([0.5, 2.0]),
    **common,
)
samples = st.builds(
    DecodingOptions,
    do_sample=st.just(True),
    seed=st.integers(0, 5),
    num_return_sequences=st.integers(1, 3),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 5, 50]),
    top_p=st.sampled_from([0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    **common,
)
# Each reads its captions once more at the end, some with their image too.
readers = st.builds(DecodingOptions, num_beams=st.just(3), rerank=st.just("grounding"), **common)
# Without what could forbid the words themselves.
forced = st.builds(
    DecodingOptions,
    num_beams=st.integers(2, 4),
    force_words=st.just(("stand-in",)),
    max_length=lengths,
    length_penalty=penalties,
    output_attentions=st.booleans(),
)
FORCED_WORDS = (ForcedWord((21, 22), (23,)), ForcedWord((24,), None))


def as_plan(options: DecodingOptions, prefix: tuple[int, ...]) -> CaptionPlan:
    words = FORCED_WORDS if options.force_words else ()
    return CaptionPlan(options, WordTokens(prefix=prefix, bad=((6,), (8, 9)), forced=words))


plans = st.builds(as_plan, st.one_of(greedy, beams, groups, samples, forced, readers), prefixes)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the step at which it is abandoned, if ever."""

    plan: CaptionPlan
    step: int
    abandoned_at: int | None


arrivals_strategy = st.lists(
    st.builds(
        Arrival,
        plans,
        st.integers(0, 12),
        st.one_of(st.none(), st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=10,
)


def request(key: int, plan: CaptionPlan) -> Request:
    return Request(key, pixels_of(key), plan)


def new_scheduler(
    model: FakeStepModel, limits: SchedulerLimits = LIMITS, encoder: ImageEncoder | None = None
) -> Scheduler:
    own = dataclasses.replace(limits, slots=model.capacity)
    return Scheduler(encoder or FakeEncoder(), model, VOCABULARY, own)


def alone(key: int, plan: CaptionPlan) -> Outcome:
    scheduler = new_scheduler(FakeStepModel(capacity=1))
    scheduler.submit(request(key, plan))
    while not (ended := scheduler.step()):
        pass
    return ended[key]


def captions_alone(key: int, plan: CaptionPlan) -> list[DecodedCaption]:
    outcome = alone(key, plan)
    assert isinstance(outcome, list), outcome
    return outcome


def as_values(outcome: Outcome) -> object:
    """An outcome in a form that can be compared: arrays and errors are not equal by value."""
    if isinstance(outcome, Exception):
        return type(outcome)
    return [
        (
            dataclasses.replace(caption, attention=None),
            None if caption.attention is None else caption.attention.tolist(),
        )
        for caption in outcome
    ]


def running(scheduler: Scheduler) -> list[Request]:
    return scheduler._running()


@settings(max_examples=60, deadline=None)
@given(arrivals_strategy, st.integers(1, 5))
def test_every_caption_ends_once_and_does_not_depend_on_its_company(
    arrivals: list[Arrival], capacity: int
) -> None:
    model = FakeStepModel(capacity)
    scheduler = new_scheduler(model)
    finished: dict[Hashable, Outcome] = {}
    abandoned: set[int] = set()
    step = 0
    while step <= 20 or not scheduler.idle:
        for key, arrival in enumerate(arrivals):
            if arrival.step == step:
                scheduler.submit(request(key, arrival.plan))
            if arrival.abandoned_at == step and arrival.step <= step and key not in finished:
                scheduler.abandon(key)
                abandoned.add(key)
        ended = scheduler.step()
        assert not ended.keys() & finished.keys()
        finished |= ended
        live = running(scheduler)
        assert len(model.histories) == len(live) <= capacity
        assert len(live) <= 1 or sum(one.rows for one in live) <= MAX_ROWS
        assert len(live) <= 1 or sum(one.entries for one in live) <= MAX_ENTRIES
        step += 1
        assert step < 1000, "the scheduler does not come to an end"

    assert model.histories == {}
    # Of images that nobody reads nothing is kept.
    assert scheduler._image_states == {}
    assert finished.keys() | abandoned == set(range(len(arrivals)))
    assert not finished.keys() & abandoned
    for name, outcome in finished.items():
        assert isinstance(name, int)
        assert as_values(outcome) == as_values(alone(name, arrivals[name].plan))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.one_of(greedy, beams, samples), prefixes)
def test_scores_follow_from_the_tokens(
    image: int, options: DecodingOptions, prefix: tuple[int, ...]
) -> None:
    plain = dataclasses.replace(
        options, repetition_penalty=1.0, no_repeat_ngram_size=0, suppress_tokens=(), min_length=0
    )
    for caption in captions_alone(image, CaptionPlan(plain, WordTokens(prefix=prefix))):
        history: tuple[int, ...] = (START, *prefix)
        expected = []
        for number, token in enumerate(caption.token_ids):
            expected.append(float(logprobs(image, history)[token]))
            if caption.attention is not None:
                # The fake's attention tells which row chose the token.
                assert caption.attention[number].tolist() == [history[-1], len(history), image]
            history = (*history, token)
        np.testing.assert_allclose(caption.token_logprobs, expected, rtol=1e-5, atol=1e-6)
        length = len(caption.token_ids)
        score = sum(expected) / length**options.length_penalty
        assert np.isclose(caption.score, score, rtol=1e-4)
        assert (caption.finish_reason == "eos") == (caption.token_ids[-1] == END)
        assert length <= options.max_length - 1 - len(prefix)
        assert END not in caption.token_ids[:-1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), plans)
def test_captions_obey_their_plan(image: int, plan: CaptionPlan) -> None:
    options, prefix = plan.options, plan.words.prefix
    for caption in captions_alone(image, plan):
        tokens = (START, *prefix, *caption.token_ids)
        assert not set(options.suppress_tokens) & set(caption.token_ids)
        assert 6 not in caption.token_ids
        pairs = list(itertools.pairwise(tokens))
        assert (8, 9) not in pairs[len(prefix) :]
        if caption.finish_reason == "eos":
            assert len(tokens) > options.min_length
        if options.no_repeat_ngram_size == 2:
            generated = pairs[len(prefix) :]
            assert len(set(generated)) == len(generated)
        if options.force_words:
            generated_tokens = caption.token_ids
            assert 24 in generated_tokens
            whole = itertools.pairwise(generated_tokens)
            assert (21, 22) in whole or generated_tokens[0] == 23


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), plans)
def test_certain_tokens_only_grow_and_are_never_taken_back(image: int, plan: CaptionPlan) -> None:
    scheduler = new_scheduler(FakeStepModel(capacity=1))
    scheduler.submit(request(image, plan))
    certain: list[tuple[int, ...]] = []
    while not (ended := scheduler.step()):
        certain.append(scheduler.certain_tokens(image))
    outcome = ended[image]
    assert isinstance(outcome, list)
    if plan.options.do_sample and plan.options.num_return_sequences > 1:
        finals = [caption.token_ids for caption in outcome]
    else:
        finals = [outcome[0].token_ids]
    for before, after in zip([(), *certain], [*certain, finals[0]], strict=True):
        assert after[: len(before)] == before
    if plan.options.rows == 1:
        read = len(plan.words.prefix)
        assert [len(tokens) for tokens in certain[read:]] == list(range(1, len(certain) - read + 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(plans, min_size=1, max_size=4))
def test_histories_grow_step_by_step_and_become_those_of_the_captions(
    asked: list[CaptionPlan],
) -> None:
    """Whatever the kinds of search, readings included, and whoever runs beside them."""
    told = [
        dataclasses.replace(plan, options=dataclasses.replace(plan.options, output_beams=True))
        for plan in asked
    ]
    scheduler = new_scheduler(FakeStepModel(capacity=8))
    for key, plan in enumerate([*told, *asked]):
        scheduler.submit(request(key, plan))
    heard: dict[Hashable, list[tuple[HistoryStep, ...]]] = {key: [()] for key in range(8)}
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        ended |= scheduler.step()
        for running, steps in heard.items():
            steps.append(scheduler.history(running) if running not in ended else steps[-1])
    for key, plan in enumerate(told):
        outcome = ended[key]
        assert isinstance(outcome, list)
        assert outcome[0].history is not None
        final = outcome[0].history.steps
        assert all(caption.history and caption.history.steps is final for caption in outcome)
        for before, after in itertools.pairwise([*heard[key], final]):
            # The same steps, not only equal ones.
            assert list(map(id, after[: len(before)])) == list(map(id, before))
            assert len(after) - len(before) <= 1
        # Each token of the longest caption has a step, of which all groups of beams are told.
        assert len(final) >= max(len(caption.token_ids) for caption in outcome)
        beams = plan.options.num_beams // plan.options.num_beam_groups
        firsts = {each // beams for each in final[0].parents.tolist()}
        assert len(firsts) == plan.options.num_beam_groups or plan.options.do_sample
    for key in range(len(told), 2 * len(told)):
        assert set(heard[key]) == {()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), plans, st.integers(0, 10))
def test_the_best_so_far_begins_as_a_caption(image: int, plan: CaptionPlan, steps: int) -> None:
    scheduler = new_scheduler(FakeStepModel(capacity=1))
    scheduler.submit(request(image, plan))
    for _ in range(steps):
        if scheduler.step():
            return
    best = scheduler.best_so_far(image)
    generated = max(0, steps - len(plan.words.prefix))
    assert all(1 <= len(caption.token_ids) <= generated for caption in best)
    assert [caption.score for caption in best] == sorted(
        (caption.score for caption in best), reverse=True
    )
    if generated and not plan.options.force_words:
        assert len(best) == plan.options.num_return_sequences or plan.options.num_beams > 1
        assert best


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), plans)
def test_groundings_are_what_the_image_adds_to_the_models_own_log_probabilities(
    image: int, plan: CaptionPlan
) -> None:
    captions = captions_alone(image, plan)
    assert len(captions) <= max(plan.options.num_return_sequences, plan.options.rows)
    for caption in captions:
        if not plan.options.wants_grounding:
            assert caption.token_groundings is None
            assert caption.image_state == ()
            continue
        # Every number of every state of the fake's is that of the image.
        assert caption.image_state == (image, image, image)
        history: tuple[int, ...] = (START, *plan.words.prefix)
        expected = []
        for token in caption.token_ids:
            added = logprobs(image, history)[token] - logprobs(NO_IMAGE, history)[token]
            expected.append(float(added))
            history = (*history, token)
        np.testing.assert_allclose(caption.token_groundings or (), expected, atol=1e-5)
        assert caption.grounding == pytest.approx(np.mean(expected), abs=1e-5)
    if plan.options.rerank == "grounding":
        assert len(captions) <= plan.options.num_return_sequences
        order = []
        for caption in captions:
            history = (START, *plan.words.prefix)
            own = []
            for token in caption.token_ids:
                own.append(float(logprobs(image, history)[token]))
                history = (*history, token)
            order.append(0.8 * float(np.mean(own)) + 0.2 * (caption.grounding or 0.0))
        assert order == pytest.approx(sorted(order, reverse=True), abs=1e-5)
        likeliest = dataclasses.replace(
            plan.options, rerank="likelihood", num_return_sequences=plan.options.rows
        )
        everything = captions_alone(image, dataclasses.replace(plan, options=likeliest))
        found = {caption.token_ids for caption in captions}
        assert found <= {caption.token_ids for caption in everything}


READER = CaptionPlan(DecodingOptions(num_beams=3, max_length=8, rerank="grounding"))


def until_read(scheduler: Scheduler) -> None:
    """Step until captions are complete, and withhold what reads them."""
    scheduler._read = dict  # type: ignore[method-assign]
    for _ in range(20):
        scheduler.step()
    del scheduler._read


def test_readings_hold_running_captions_up_by_few_rows() -> None:
    model = FakeStepModel(capacity=20)
    scheduler = new_scheduler(model, dataclasses.replace(LIMITS, max_rows=60, max_entries=480))
    for key in range(10):
        scheduler.submit(request(key, READER))
    until_read(scheduler)
    assert scheduler.running == 10
    assert not scheduler.idle
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        before = len(model.readings)
        ended |= scheduler.step()
        assert len(model.readings) == before + 1
    assert len(model.readings) > 1
    assert max(model.readings) <= 60
    assert list(ended) == list(range(10))
    assert model.histories == {}


def test_a_request_that_is_to_be_read_can_be_abandoned_and_has_a_best_so_far() -> None:
    model = FakeStepModel(capacity=4)
    scheduler = new_scheduler(model)
    for key in range(3):
        scheduler.submit(request(key, READER))
    until_read(scheduler)
    (best,) = scheduler.best_so_far(1)
    assert best.token_groundings is None
    certain = scheduler.certain_tokens(1)
    scheduler.abandon(1)
    assert len(model.histories) == 2
    ended = scheduler.step() | scheduler.step()
    assert ended.keys() == {0, 2}
    assert model.histories == {}
    (chosen,) = captions_alone(1, READER)
    assert chosen.token_ids[: len(certain)] == certain
    assert scheduler.best_so_far(1) == []


def test_a_reading_that_fails_ends_those_that_were_read() -> None:
    model = Failing(4, {"read": {1}})
    scheduler = new_scheduler(model)
    scheduler.submit(request(0, READER))
    scheduler.submit(request(1, CaptionPlan(DecodingOptions(max_length=12, min_length=12))))
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        ended |= scheduler.step()
    assert isinstance(ended[0], ModelFaultError)
    assert as_values(ended[1]) == as_values(
        alone(1, CaptionPlan(DecodingOptions(max_length=12, min_length=12)))
    )
    assert model.histories == {}


def test_a_reading_without_numbers_is_a_fault_of_its_caption() -> None:
    class NoNumbersForOne(FakeStepModel):
        def forced_logprobs(self, slot: int | None, rows: ForcedRows) -> Float32Array:
            found = super().forced_logprobs(slot, rows)
            if slot is not None and self.histories[slot][0] == FAULTY:
                found[0] = np.nan
            return found

    # Something changes the log-probabilities, so that they are read with the image too.
    options = dataclasses.replace(READER.options, repetition_penalty=1.5)
    model = NoNumbersForOne(capacity=8)
    scheduler = new_scheduler(model)
    for key in range(4):
        scheduler.submit(request(key, CaptionPlan(options)))
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        ended |= scheduler.step()
    faults = {key for key, outcome in ended.items() if isinstance(outcome, ModelFaultError)}
    assert faults == {FAULTY}
    assert model.histories == {}


def test_captions_are_admitted_in_their_order() -> None:
    scheduler = new_scheduler(FakeStepModel(capacity=1))
    for key in range(5):
        scheduler.submit(request(key, CaptionPlan(DecodingOptions(max_length=3))))
    order: list[Hashable] = []
    while not scheduler.idle:
        order += scheduler.step()
    assert order == list(range(5))


def test_a_stream_of_short_captions_does_not_starve_a_long_one() -> None:
    scheduler = new_scheduler(FakeStepModel(capacity=20))
    short = CaptionPlan(DecodingOptions(max_length=4))
    wide = CaptionPlan(DecodingOptions(num_beams=10, max_length=8))
    for key in range(6):
        scheduler.submit(request(key, short))
    scheduler.step()
    scheduler.submit(request(1000, wide))
    ended: dict[Hashable, Outcome] = {}
    key = 6
    while 1000 not in ended:
        # Two more arrive for each step; all of them would find room.
        for _ in range(2):
            scheduler.submit(request(key, short))
            key += 1
        ended |= scheduler.step()
        assert key < 100, "the wide caption starves"


def test_newcomers_hold_live_captions_up_by_few_prefills() -> None:
    model = FakeStepModel(capacity=20)
    scheduler = new_scheduler(model)
    plan = CaptionPlan(DecodingOptions(max_length=12))
    scheduler.submit(request(0, plan))
    scheduler.step()
    for key in range(1, 9):
        scheduler.submit(request(key, plan))
    while not scheduler.idle:
        scheduler.step()
    assert max(model.prefills) == LIMITS.max_admissions


def test_one_caption_beyond_the_limits_runs_alone() -> None:
    model = FakeStepModel(capacity=20)
    scheduler = new_scheduler(model, SchedulerLimits(max_rows=2, max_entries=10, max_admissions=4))
    for key in range(3):
        scheduler.submit(request(key, CaptionPlan(DecodingOptions(num_beams=4, max_length=8))))
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        ended |= scheduler.step()
        assert len(running(scheduler)) <= 1
    assert len(ended) == 3


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_caption_without_numbers_fails_alone(num_beams: int) -> None:
    class FaultyForOne(FakeStepModel):
        def step(self, batch: StepBatch) -> StepAnswer:
            answer = super().step(batch)
            faulty = [self.histories[slot][0] == FAULTY for slot in batch.slots.tolist()]
            counts = batch.rows.candidate_counts
            of_row = np.repeat(np.repeat(faulty, batch.row_counts), counts)
            answer.logprobs[of_row] = np.nan
            return answer

    plan = CaptionPlan(DecodingOptions(num_beams=num_beams, max_length=8))
    model = FaultyForOne(capacity=8)
    scheduler = new_scheduler(model)
    for key in range(4):
        scheduler.submit(request(key, plan))
    outcomes: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        outcomes |= scheduler.step()

    assert isinstance(outcomes.pop(FAULTY), ModelFaultError)
    assert outcomes == {key: alone(key, plan) for key in range(4) if key != FAULTY}
    assert model.histories == {}


def test_words_that_other_options_forbid_are_an_error_of_the_options() -> None:
    options = DecodingOptions(
        num_beams=3, force_words=("stand-in",), suppress_tokens=(24,), max_length=8
    )
    model = FakeStepModel(capacity=1)
    scheduler = new_scheduler(model)
    scheduler.submit(request(1, as_plan(options, ())))
    ended: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        ended |= scheduler.step()
    outcome = ended[1]
    assert isinstance(outcome, InvalidOptionsError)
    assert set(outcome.field_violations) == {"force_words"}
    assert model.histories == {}


def test_an_image_is_encoded_once_however_long_it_waits_for_a_slot() -> None:
    encoder = FakeEncoder()
    scheduler = new_scheduler(FakeStepModel(capacity=2), encoder=encoder)
    for key in range(10):
        scheduler.submit(request(key, CaptionPlan(DecodingOptions(max_length=8))))
    while not scheduler.idle:
        scheduler.step()
    assert sum(encoder.batches) == 10
    assert max(encoder.batches) == LIMITS.max_admissions


def test_an_encoder_that_fails_fails_only_its_own_images() -> None:
    class FailsForOne(FakeEncoder):
        def encode(self, pixels: UInt8Array) -> Float32Array:
            states = super().encode(pixels)
            if FAULTY in states:
                raise ModelFaultError("the encoder failed")
            return states

    plan = CaptionPlan(DecodingOptions(max_length=8))
    model = FakeStepModel(capacity=8)
    scheduler = new_scheduler(model, encoder=FailsForOne())
    for key in range(6):
        scheduler.submit(request(key, plan))
    outcomes: dict[Hashable, Outcome] = {}
    while not scheduler.idle:
        outcomes |= scheduler.step()

    failed = {key for key, outcome in outcomes.items() if isinstance(outcome, ModelFaultError)}
    # Those that were encoded together.
    assert failed == {FAULTY, FAULTY + 1}
    assert outcomes.keys() == set(range(6))
    assert model.histories == {}


class Failing(FakeStepModel):
    """Fails at the calls that a test names, by a counter of each kind."""

    def __init__(self, capacity: int, failing: dict[str, set[int]]) -> None:
        super().__init__(capacity)
        self._failing = failing
        self._calls = dict.fromkeys(failing, 0)

    def _count(self, kind: str) -> None:
        self._calls[kind] = self._calls.get(kind, 0) + 1
        if self._calls[kind] in self._failing.get(kind, set()):
            raise RuntimeError(f"{kind} fails")

    def prefill(self, states: Float32Array) -> Int64Array:
        self._count("prefill")
        return super().prefill(states)

    def step(self, batch: StepBatch) -> StepAnswer:
        self._count("step")
        return super().step(batch)

    def forced_logprobs(self, slot: int | None, rows: ForcedRows) -> Float32Array:
        self._count("read")
        return super().forced_logprobs(slot, rows)

    def free(self, slots: Int64Array) -> None:
        self._count("free")
        super().free(slots)


calls = st.sets(st.integers(1, 20), max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(plans, st.integers(0, 8)), min_size=1, max_size=8),
    st.fixed_dictionaries({"prefill": calls, "step": calls, "read": calls, "free": calls}),
    st.integers(3, 5),
)
def test_whatever_fails_every_request_ends_once_and_all_room_comes_back(
    arrivals: list[tuple[CaptionPlan, int]], failing: dict[str, set[int]], capacity: int
) -> None:
    model = Failing(capacity, failing)
    scheduler = new_scheduler(model)
    ended: dict[Hashable, Outcome] = {}
    step = idle = 0
    # Some more at the end, for slots that were not taken back at once.
    while step <= 8 or idle < 6:
        for key, (plan, begins) in enumerate(arrivals):
            if begins == step:
                scheduler.submit(request(key, plan))
        try:
            now = scheduler.step()
        except RuntimeError:
            # No slot is taken back any more: the one failure that must be loud.
            assert len(failing["free"]) >= 1
            assert not scheduler._limits.slots > len(scheduler._owed)
            return
        assert not now.keys() & ended.keys()
        ended |= now
        step += 1
        idle = idle + 1 if scheduler.idle else 0
        assert step < 1000, "the scheduler does not come to an end"
    assert model.histories == {}
    assert ended.keys() == set(range(len(arrivals)))
    for key, (plan, _) in enumerate(arrivals):
        if not isinstance(ended[key], ModelFaultError):
            assert as_values(ended[key]) == as_values(alone(key, plan))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(plans, min_size=2, max_size=6),
    st.integers(0, 5),
    st.sampled_from(["step", "advance"]),
    st.integers(1, 4),
)
def test_a_search_that_raises_ends_its_own_caption_only(
    given_plans: list[CaptionPlan], guilty: int, where: str, at: int
) -> None:
    guilty %= len(given_plans)
    marked = dataclasses.replace(given_plans[guilty])
    given_plans[guilty] = marked
    calls_of_guilty = {"count": 0}
    originals: dict[str, Any] = {}

    def raising(search: Any) -> None:
        if any(plan is marked for plan in search.lanes.plans):
            calls_of_guilty["count"] += 1
            if calls_of_guilty["count"] >= at:
                raise ZeroDivisionError("a bug of one caption's search")

    def step(search: Any) -> Any:
        raising(search)
        return originals["step"](search)

    def advance(own: Any, answer: StepAnswer) -> Any:
        raising(own.search)
        return originals["advance"](own, answer)

    owner: Any = Search if where == "step" else SearchStep
    originals[where] = getattr(owner, where)
    model = FakeStepModel(capacity=8)
    scheduler = new_scheduler(model)
    ended: dict[Hashable, Outcome] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, where, {"step": step, "advance": advance}[where])
        for key, plan in enumerate(given_plans):
            scheduler.submit(request(key, plan))
        while not scheduler.idle:
            ended |= scheduler.step()
    assert model.histories == {}
    assert ended.keys() == set(range(len(given_plans)))
    for key, plan in enumerate(given_plans):
        if key == guilty:
            assert isinstance(ended[key], ModelFaultError) or calls_of_guilty["count"] < at
        else:
            assert as_values(ended[key]) == as_values(alone(key, plan))
