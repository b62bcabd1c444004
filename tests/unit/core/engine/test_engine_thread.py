"""The engine's thread: many submitters, callers that go, a model that fails."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from captionserve_server.core.captions import CaptionPlan, SpecialTokens
from captionserve_server.core.engine.engine_thread import EngineThread
from captionserve_server.core.engine.scheduler import CaptionEngine, EngineLimits
from captionserve_server.core.errors import (
    CancelledError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import StepAnswer, StepBatch

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
LIMITS = EngineLimits(max_rows=8)


class HeldModel(FakeStepModel):
    """Steps only while it is let, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(capacity=4)
        self.may_step = threading.Event()
        self.stepping = threading.Event()
        self.failing = False

    def step(self, batch: StepBatch) -> StepAnswer:
        self.stepping.set()
        assert self.may_step.wait(WAIT_SECONDS)
        if self.failing:
            raise ModelFaultError("the model failed")
        return super().step(batch)


class Setup:
    """A thread over a held model, and what it logged."""

    def __init__(self) -> None:
        self.model = HeldModel()
        self.log: list[str] = []
        engine = CaptionEngine(
            FakeEncoder(),
            self.model,
            Vocabulary(SpecialTokens(START, (END,)), VOCABULARY_SIZE),
            LIMITS,
        )
        self.thread = EngineThread(engine, self.log.append)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.model.may_step.set()
    made.thread.close()


class Audience:
    """Who waits, for as long as a test says."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.gone = threading.Event()
        self.deadline = deadline
        self.heard: list[tuple[int, ...]] = []

    @property
    def has_gone(self) -> bool:
        return self.gone.is_set()

    def hear(self, certain_tokens: Callable[[], tuple[int, ...]]) -> None:
        self.heard.append(certain_tokens())


def test_many_submitters_get_each_their_own(setup: Setup) -> None:
    setup.model.may_step.set()
    with ThreadPoolExecutor(16) as pool:
        futures = list(
            pool.map(
                lambda image: setup.thread.submit(pixels_of(image % 8), PLAN, Audience()), range(64)
            )
        )
    results = [future.result(WAIT_SECONDS) for future in futures]
    assert all(results[image] == results[image % 8] for image in range(64))
    assert len({result[0].token_ids for result in results}) > 1
    assert setup.model.histories == {}


def test_a_caller_that_has_gone_frees_its_slot_and_nobody_else_notices(setup: Setup) -> None:
    audience = Audience()
    leaving = setup.thread.submit(pixels_of(1), PLAN, audience)
    staying = setup.thread.submit(pixels_of(2), PLAN, Audience())
    assert setup.model.stepping.wait(WAIT_SECONDS)
    audience.gone.set()
    setup.model.may_step.set()

    with pytest.raises(CancelledError):
        leaving.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_a_model_that_fails_fails_who_is_under_way_and_serves_the_next(setup: Setup) -> None:
    setup.model.failing = True
    failing = setup.thread.submit(pixels_of(1), PLAN, Audience())
    setup.model.may_step.set()
    with pytest.raises(ModelFaultError):
        failing.result(WAIT_SECONDS)
    assert setup.log

    setup.model.failing = False
    assert setup.thread.submit(pixels_of(1), PLAN, Audience()).result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_closing_fails_who_is_under_way_and_refuses_the_next() -> None:
    setup = Setup()
    waiting = setup.thread.submit(pixels_of(1), PLAN, Audience())
    assert setup.model.stepping.wait(WAIT_SECONDS)
    closer = threading.Thread(target=setup.thread.close)
    closer.start()
    setup.model.may_step.set()
    closer.join(WAIT_SECONDS)

    with pytest.raises(ModelUnavailableError):
        waiting.result(WAIT_SECONDS)
    with pytest.raises(ModelUnavailableError):
        setup.thread.submit(pixels_of(1), PLAN, Audience())


def test_the_deadline_ends_a_caption_between_steps(setup: Setup) -> None:
    late = setup.thread.submit(pixels_of(1), PLAN, Audience(deadline=time.monotonic()))
    staying = setup.thread.submit(pixels_of(2), PLAN, Audience())
    setup.model.may_step.set()

    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_the_deadline_gives_the_best_so_far_to_who_allows_it(setup: Setup) -> None:
    audience = Audience()
    partial = setup.thread.submit(pixels_of(1), PARTIAL, audience)
    assert setup.model.stepping.wait(WAIT_SECONDS)
    audience.deadline = time.monotonic()
    setup.model.may_step.set()

    (caption,) = partial.result(WAIT_SECONDS)
    assert caption.finish_reason == "deadline"
    assert len(caption.token_ids) == 1
    assert setup.model.histories == {}


def test_nothing_so_far_is_an_error_also_for_who_allows_partial_captions(setup: Setup) -> None:
    setup.model.may_step.set()
    late = setup.thread.submit(pixels_of(1), PARTIAL, Audience(deadline=time.monotonic()))
    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_SECONDS)


def test_the_audience_hears_after_each_step_what_is_certain(setup: Setup) -> None:
    setup.model.may_step.set()
    audience = Audience()
    plan = CaptionPlan(DecodingOptions(max_length=8))
    (caption,) = setup.thread.submit(pixels_of(1), plan, audience).result(WAIT_SECONDS)
    steps = range(1, len(caption.token_ids))
    assert audience.heard == [caption.token_ids[:step] for step in steps]
