"""The engine's thread: many submitters, callers that go, a model that fails."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from captionserve_server.core.captions import CaptionPlan, DecodedCaption, SpecialTokens
from captionserve_server.core.engine.engine_thread import Answer, EngineThread
from captionserve_server.core.engine.scheduler import Scheduler, SchedulerLimits
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.history import HistoryStep
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import StepAnswer, StepBatch, UInt8Array
from captionserve_server.core.updates import Progress

from tests.unit.core.fake_step_model import (
    END,
    START,
    VOCABULARY_SIZE,
    FakeEncoder,
    FakeStepModel,
    pixels_of,
)

WAIT_SECONDS = 30.0
PLAN = CaptionPlan(DecodingOptions(num_beams=2, max_length=8))
PARTIAL = CaptionPlan(DecodingOptions(num_beams=2, max_length=8, allow_partial=True))
LIMITS = SchedulerLimits(slots=4, max_rows=8)


class HeldModel(FakeStepModel):
    """Steps only while it is let, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(capacity=4)
        self.may_step = threading.Event()
        self.stepping = threading.Event()
        self.failing = False
        # A picture of which it gives no numbers.
        self.faulty: int | None = None

    def step(self, batch: StepBatch) -> StepAnswer:
        self.stepping.set()
        assert self.may_step.wait(WAIT_SECONDS)
        if self.failing:
            raise ModelFaultError("the model failed")
        answer = super().step(batch)
        wrong = [self.histories[slot][0] == self.faulty for slot in batch.slots.tolist()]
        of_row = np.repeat(np.repeat(wrong, batch.row_counts), batch.rows.candidate_counts)
        answer.logprobs[of_row] = np.nan
        return answer


class Setup:
    """A thread over a held model, and what it logged."""

    def __init__(self) -> None:
        self.model = HeldModel()
        self.log: list[str] = []
        scheduler = Scheduler(
            FakeEncoder(),
            self.model,
            Vocabulary(SpecialTokens(START, (END,)), VOCABULARY_SIZE),
            LIMITS,
        )
        self.thread = EngineThread(scheduler, self.log.append)

    def submit(
        self, pixels: UInt8Array, plan: CaptionPlan, caller: Caller, *parts: UInt8Array
    ) -> Future[list[list[DecodedCaption]]]:
        self.thread.submit([pixels, *parts], plan, caller)
        return caller.captions


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.model.may_step.set()
    made.thread.close(WAIT_SECONDS)


class Caller:
    """Who waits, for as long as a test says."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.gone = threading.Event()
        self.deadline = deadline
        self.heard: list[tuple[int, ...]] = []
        self.steps: list[tuple[HistoryStep, ...]] = []
        self.captions: Future[list[list[DecodedCaption]]] = Future()
        self.ended = 0

    @property
    def has_gone(self) -> bool:
        return self.gone.is_set()

    def hear(self, progress: Progress) -> None:
        self.heard.append(progress.certain_tokens())
        self.steps.append(progress.history())

    def end(self, answer: Answer) -> None:
        self.ended += 1
        if isinstance(answer, CaptionServeError):
            self.captions.set_exception(answer)
        else:
            self.captions.set_result(answer)


def test_many_submitters_get_each_their_own(setup: Setup) -> None:
    setup.model.may_step.set()
    with ThreadPoolExecutor(16) as pool:
        futures = list(
            pool.map(lambda image: setup.submit(pixels_of(image % 8), PLAN, Caller()), range(64))
        )
    results = [future.result(WAIT_SECONDS) for future in futures]
    assert all(results[image] == results[image % 8] for image in range(64))
    assert len({result[0][0].token_ids for result in results}) > 1
    assert setup.model.histories == {}


def test_a_caller_that_has_gone_frees_its_slot_and_nobody_else_notices(setup: Setup) -> None:
    caller = Caller()
    leaving = setup.submit(pixels_of(1), PLAN, caller)
    staying = setup.submit(pixels_of(2), PLAN, Caller())
    assert setup.model.stepping.wait(WAIT_SECONDS)
    caller.gone.set()
    setup.model.may_step.set()

    with pytest.raises(CancelledError):
        leaving.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_a_model_that_fails_fails_who_is_under_way_and_serves_the_next(setup: Setup) -> None:
    setup.model.failing = True
    failing = setup.submit(pixels_of(1), PLAN, Caller())
    setup.model.may_step.set()
    with pytest.raises(ModelFaultError):
        failing.result(WAIT_SECONDS)
    assert setup.log

    setup.model.failing = False
    assert setup.submit(pixels_of(1), PLAN, Caller()).result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_closing_fails_who_is_under_way_and_refuses_the_next() -> None:
    setup = Setup()
    waiting = setup.submit(pixels_of(1), PLAN, Caller())
    assert setup.model.stepping.wait(WAIT_SECONDS)
    closer = threading.Thread(target=setup.thread.close, args=(WAIT_SECONDS,))
    closer.start()
    setup.model.may_step.set()
    closer.join(WAIT_SECONDS)

    with pytest.raises(ModelUnavailableError):
        waiting.result(WAIT_SECONDS)
    with pytest.raises(ModelUnavailableError):
        setup.submit(pixels_of(1), PLAN, Caller())


def test_the_deadline_ends_a_caption_between_steps(setup: Setup) -> None:
    late = setup.submit(pixels_of(1), PLAN, Caller(deadline=time.monotonic()))
    staying = setup.submit(pixels_of(2), PLAN, Caller())
    setup.model.may_step.set()

    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_the_deadline_gives_the_best_so_far_to_who_allows_it(setup: Setup) -> None:
    caller = Caller()
    partial = setup.submit(pixels_of(1), PARTIAL, caller)
    assert setup.model.stepping.wait(WAIT_SECONDS)
    caller.deadline = time.monotonic()
    setup.model.may_step.set()

    ((caption,),) = partial.result(WAIT_SECONDS)
    assert caption.finish_reason == "deadline"
    assert len(caption.token_ids) == 1
    assert setup.model.histories == {}


def test_nothing_so_far_is_an_error_also_for_who_allows_partial_captions(setup: Setup) -> None:
    setup.model.may_step.set()
    late = setup.submit(pixels_of(1), PARTIAL, Caller(deadline=time.monotonic()))
    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_SECONDS)


def test_the_caller_hears_after_each_step_what_is_certain(setup: Setup) -> None:
    setup.model.may_step.set()
    caller = Caller()
    plan = CaptionPlan(DecodingOptions(max_length=8))
    ((caption,),) = setup.submit(pixels_of(1), plan, caller).result(WAIT_SECONDS)
    steps = range(1, len(caption.token_ids))
    assert caller.heard == [caption.token_ids[:step] for step in steps]


def test_the_caller_hears_after_each_step_what_was_considered_if_it_wants_to_know(
    setup: Setup,
) -> None:
    setup.model.may_step.set()
    for wanted in (True, False):
        caller = Caller()
        plan = CaptionPlan(DecodingOptions(num_beams=2, max_length=8, output_beams=wanted))
        ((caption, *_),) = setup.submit(pixels_of(1), plan, caller).result(WAIT_SECONDS)
        if not wanted:
            assert set(caller.steps) == {()}
            continue
        assert caption.history is not None
        steps = caption.history.steps
        # The last ones are told with the captions.
        assert [len(heard) for heard in caller.steps] == list(range(1, len(steps)))
        for heard in caller.steps:
            assert all(one is other for one, other in zip(heard, steps, strict=False))


def test_an_image_and_its_parts_are_one_answer_in_their_order(setup: Setup) -> None:
    setup.model.may_step.set()
    # More than there are slots, and the same picture twice.
    numbers = [3, 1, 2, 1, 4, 5]
    whole, *parts = map(pixels_of, numbers)
    together = setup.submit(whole, PLAN, Caller(), *parts).result(WAIT_SECONDS)
    alone = [setup.submit(pixels_of(n), PLAN, Caller()).result(WAIT_SECONDS) for n in numbers]
    assert together == [captions for (captions,) in alone]
    assert setup.model.histories == {}


def test_only_the_whole_images_words_are_heard(setup: Setup) -> None:
    setup.model.may_step.set()
    alone, with_parts = Caller(), Caller()
    plan = CaptionPlan(DecodingOptions(max_length=8))
    setup.submit(pixels_of(1), plan, alone).result(WAIT_SECONDS)
    setup.submit(pixels_of(1), plan, with_parts, pixels_of(2), pixels_of(3)).result(WAIT_SECONDS)
    assert with_parts.heard == alone.heard


def test_a_part_that_fails_ends_its_image_once_and_nobody_elses(setup: Setup) -> None:
    caller = Caller()
    setup.model.faulty = 2
    failing = setup.submit(pixels_of(1), PLAN, caller, pixels_of(2), pixels_of(3))
    staying = setup.submit(pixels_of(4), PLAN, Caller())
    setup.model.may_step.set()
    with pytest.raises(ModelFaultError):
        failing.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert caller.ended == 1
    assert setup.model.histories == {}


def test_a_caller_that_has_gone_takes_all_parts_along(setup: Setup) -> None:
    caller = Caller()
    # Two run and four wait for a slot.
    leaving = setup.submit(pixels_of(1), PLAN, caller, *map(pixels_of, range(2, 7)))
    staying = setup.submit(pixels_of(2), PLAN, Caller())
    assert setup.model.stepping.wait(WAIT_SECONDS)
    caller.gone.set()
    setup.model.may_step.set()
    with pytest.raises(CancelledError):
        leaving.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert caller.ended == 1
    assert setup.model.histories == {}


def test_at_the_deadline_parts_that_have_not_begun_have_no_captions(setup: Setup) -> None:
    caller = Caller()
    partial = setup.submit(pixels_of(1), PARTIAL, caller, *map(pixels_of, range(2, 7)))
    assert setup.model.stepping.wait(WAIT_SECONDS)
    caller.deadline = time.monotonic()
    setup.model.may_step.set()
    whole, *parts = partial.result(WAIT_SECONDS)
    assert [caption.finish_reason for caption in whole] == ["deadline"]
    # Of six pictures four had a slot.
    assert [len(captions) for captions in parts] == [1, 1, 1, 0, 0]
    assert setup.model.histories == {}


def test_closing_tells_who_has_parts_once() -> None:
    setup, caller = Setup(), Caller()
    waiting = setup.submit(pixels_of(1), PLAN, caller, pixels_of(2))
    assert setup.model.stepping.wait(WAIT_SECONDS)
    setup.model.may_step.set()
    setup.thread.close(WAIT_SECONDS)
    with suppress(ModelUnavailableError):
        waiting.result(WAIT_SECONDS)
    assert caller.ended == 1
