"""The engine's thread: many submitters, callers that go, a model that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from captionserve_server.core.engine import CaptionEngine
from captionserve_server.core.errors import CancelledError, ModelFaultError, ModelUnavailableError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import SpecialTokens
from captionserve_server.core.step_model import Candidates, Float32Array, StepBatch
from captionserve_server.triton.engine_thread import EngineThread

from tests.unit.fake_step_model import END, START, FakeStepModel

WAIT_SECONDS = 30.0
OPTIONS = DecodingOptions(num_beams=2, max_length=8)


class HeldModel(FakeStepModel):
    """Steps only while it is let, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__(capacity=4)
        self.may_step = threading.Event()
        self.stepping = threading.Event()
        self.failing = False

    def step(self, batch: StepBatch) -> Candidates:
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
        engine = CaptionEngine(self.model, SpecialTokens(START, (END,)), max_rows=8)
        self.thread = EngineThread(engine, self.log.append)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.model.may_step.set()
    made.thread.close()


def states(image: int) -> Float32Array:
    return np.full((2, 3), image, np.float32)


def stays() -> bool:
    return False


def test_many_submitters_get_each_their_own(setup: Setup) -> None:
    setup.model.may_step.set()
    with ThreadPoolExecutor(16) as pool:
        futures = list(
            pool.map(
                lambda image: setup.thread.submit(states(image % 8), OPTIONS, stays), range(64)
            )
        )
    results = [future.result(WAIT_SECONDS) for future in futures]
    assert all(results[image] == results[image % 8] for image in range(64))
    assert len({result[0].token_ids for result in results}) > 1
    assert setup.model.histories == {}


def test_a_caller_that_has_gone_frees_its_slot_and_nobody_else_notices(setup: Setup) -> None:
    gone = threading.Event()
    leaving = setup.thread.submit(states(1), OPTIONS, gone.is_set)
    staying = setup.thread.submit(states(2), OPTIONS, stays)
    assert setup.model.stepping.wait(WAIT_SECONDS)
    gone.set()
    setup.model.may_step.set()

    with pytest.raises(CancelledError):
        leaving.result(WAIT_SECONDS)
    assert staying.result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_a_model_that_fails_fails_who_is_under_way_and_serves_the_next(setup: Setup) -> None:
    setup.model.failing = True
    failing = setup.thread.submit(states(1), OPTIONS, stays)
    setup.model.may_step.set()
    with pytest.raises(ModelFaultError):
        failing.result(WAIT_SECONDS)
    assert setup.log

    setup.model.failing = False
    assert setup.thread.submit(states(1), OPTIONS, stays).result(WAIT_SECONDS)
    assert setup.model.histories == {}


def test_closing_fails_who_is_under_way_and_refuses_the_next() -> None:
    setup = Setup()
    waiting = setup.thread.submit(states(1), OPTIONS, stays)
    assert setup.model.stepping.wait(WAIT_SECONDS)
    closer = threading.Thread(target=setup.thread.close)
    closer.start()
    setup.model.may_step.set()
    closer.join(WAIT_SECONDS)

    with pytest.raises(ModelUnavailableError):
        waiting.result(WAIT_SECONDS)
    with pytest.raises(ModelUnavailableError):
        setup.thread.submit(states(1), OPTIONS, stays)
