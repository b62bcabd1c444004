"""The scheduler: which requests are decoded together, step by step, without I/O.

Encoder and decoder take turns: between two steps the next images are encoded. Each has all cores
while it runs, which does more in the same time than both at once (docs/adr/0011), and how long
running requests wait for newcomers is bounded and the scheduler's own choice.

Rules, which tests/unit/core/engine/test_scheduler.py holds on any mixture of requests and failures:
    1. Every submitted request ends exactly once: in the outcomes of a `step`, or by `abandon`.
    2. A request that ends gives its slot back in the same call; no slot is in two requests' hands.
    3. Requests are admitted in the order in which they were submitted. One that finds no room
       waits, and so do all behind it: short ones never pass a long one by.
    4. What a caption becomes does not depend on what else is in the batch.
    5. Running requests stay within the limits of rows and entries; one alone may exceed them.
    6. Newcomers cost running requests at most `max_admissions` encoded images at a step.
    7. A failure ends those whom it concerns: of encoder and prefill the images given to them, of a
       step all that are running, of a search the one caption in which it lies, of a reading those
       that are read.
    8. Readings cost running requests at most `max_rows` rows at a step, or one request's, and as
       many again where what is read has to be read over its image too.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.engine.timeline import Timeline
from captionserve_server.core.errors import (
    CaptionServeError,
    InvalidOptionsError,
    ModelFaultError,
)
from captionserve_server.core.history import HistoryStep
from captionserve_server.core.search import (
    Search,
    SearchStep,
    Vocabulary,
    search_kind,
    start_search,
)
from captionserve_server.core.search.grounding import (
    ROWS_TOGETHER,
    Text,
    forced_rows,
    grounded,
    has_own_logprobs,
)
from captionserve_server.core.search.logits_processors import joined
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    ImageEncoder,
    Int64Array,
    RowRequests,
    StepAnswer,
    StepBatch,
    StepModel,
    UInt8Array,
)

Outcome = list[DecodedCaption] | CaptionServeError
"""The captions of one request, best first, or why there are none."""


@dataclass(frozen=True)
class Request:
    """One image to caption.

    Attributes:
        key: the caller's own name for it.
        pixels: uint8 [3, height, width], of the encoder's size.
        plan: how to decode.
        timeline: where its stages are taken down.
    """

    key: Hashable
    pixels: UInt8Array
    plan: CaptionPlan
    timeline: Timeline = field(default_factory=Timeline, compare=False)

    @property
    def rows(self) -> int:
        """Most rows it takes at a step."""
        return self.plan.options.rows

    @property
    def entries(self) -> int:
        """Most keys and values it remembers in each layer."""
        return self.rows * self.plan.options.max_length


@dataclass(frozen=True)
class SchedulerLimits:
    """What running requests may take together.

    Attributes:
        slots: requests; the step model must have as many.
        max_rows: rows, summed over the requests; bounds a step's time.
        max_entries: rows x max_length, likewise; bounds the memory of keys and values.
        max_admissions: images encoded and taken in between two steps.
    """

    slots: int = 32
    max_rows: int = 128
    max_entries: int = 8192
    max_admissions: int = 4

    def check(self) -> None:
        """Refuse limits under which nothing would ever be decoded; ValueError names them."""
        wrong = [f"{name}, which is {value}" for name, value in vars(self).items() if value < 1]
        if wrong:
            raise ValueError(f"limits must be 1 or more, not {', '.join(wrong)}")


@dataclass
class _Batch:
    """Requests that one search decodes, in the order of its lanes.

    Attributes:
        kind: what they have in common.
        search: never changed, only replaced, so that a step that raised can be gone back on.
        requests: [lanes].
        slots: [lanes].
    """

    kind: Hashable
    search: Search
    requests: list[Request]
    slots: list[int]

    def kept(self, staying: BoolArray) -> _Batch:
        """The lanes that stay, as a batch of their own."""
        return _Batch(
            self.kind,
            self.search.kept(staying),
            [request for request, stays in zip(self.requests, staying, strict=True) if stays],
            [slot for slot, stays in zip(self.slots, staying, strict=True) if stays],
        )

    def parted(self) -> list[_Batch]:
        """Every lane as a batch of its own."""
        return [self.kept(one) for one in np.eye(len(self.requests), dtype=np.bool_)]


@dataclass(frozen=True)
class _Reading:
    """A request whose captions are complete, and are to be read once more for their grounding.

    Attributes:
        request: which.
        slot: that of its image, which it still holds.
        captions: best first.
    """

    request: Request
    slot: int
    captions: list[DecodedCaption]

    @property
    def rows(self) -> int:
        """Most rows that it takes: one for each token of all captions, and what fills them up."""
        given = self.request.plan.given_tokens
        tokens = sum(given + len(caption.token_ids) - 1 for caption in self.captions)
        return tokens + -tokens % ROWS_TOGETHER

    @property
    def certain_tokens(self) -> tuple[int, ...]:
        """What all share that may yet be the first."""
        reranks = self.request.plan.options.rerank == "grounding"
        candidates = self.captions if reranks else self.captions[:1]
        together = zip(*(caption.token_ids for caption in candidates), strict=False)
        return tuple(each[0] for each in takewhile(lambda each: len(set(each)) == 1, together))

    def texts(self, start: int) -> list[Text]:
        """What is read, behind the start token."""
        given = (start, *self.request.plan.words.prefix)
        return [(given, caption.token_ids) for caption in self.captions]


class Scheduler:
    """Steps all running requests together and admits waiting ones between steps."""

    def __init__(
        self,
        encoder: ImageEncoder,
        step_model: StepModel,
        vocabulary: Vocabulary,
        limits: SchedulerLimits,
    ) -> None:
        """Begin with nothing to do.

        Args:
            encoder: asked for at most `max_admissions` images at once.
            step_model: the decoder, with at least `slots` slots, all of them free.
            vocabulary: the checkpoint's tokens.
            limits: what running requests may take together.

        Raises:
            ValueError: if nothing would ever be decoded under the limits.
        """
        limits.check()
        self._encoder = encoder
        self._step_model = step_model
        self._vocabulary = vocabulary
        self._limits = limits
        self._waiting: deque[Request] = deque()
        self._batches: list[_Batch] = []
        self._readings: deque[_Reading] = deque()
        # Slots whose requests have ended, and which the step model would not take back yet.
        self._owed: list[int] = []
        # Mean encoder states, by slot, of those that will be read.
        self._image_states: dict[int, tuple[float, ...]] = {}
        # Admitted, and without a token yet.
        self._fresh: list[Request] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._batches or self._readings)

    @property
    def running(self) -> int:
        """Requests being decoded, or read."""
        return len(self._running())

    @property
    def waiting(self) -> int:
        """Requests that have not found room yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def abandon(self, key: Hashable) -> None:
        """Forget a request wherever it stands; a key that is not here is ignored."""
        self._waiting = deque(request for request in self._waiting if request.key != key)
        for batch in self._batches:
            going = np.array([request.key == key for request in batch.requests])
            if going.any():
                self._release([(batch, going)])
                return
        for reading in self._readings:
            if reading.request.key == key:
                self._readings = deque(each for each in self._readings if each is not reading)
                self._give_back([reading.slot])
                return

    def best_so_far(self, key: Hashable) -> list[DecodedCaption]:
        """The best captions that a running request has now; empty for one that has not begun."""
        reading = self._find_reading(key)
        if reading is not None:
            return reading.captions[: reading.request.plan.options.num_return_sequences]
        found = self._find(key)
        if found is None:
            return []
        batch, lane = found
        wanted = batch.requests[lane].plan.options.num_return_sequences
        return batch.search.best_so_far(lane)[:wanted]

    def certain_tokens(self, key: Hashable) -> tuple[int, ...]:
        """The generated tokens with which a running request's caption will begin for certain."""
        reading = self._find_reading(key)
        if reading is not None:
            return reading.certain_tokens
        found = self._find(key)
        return () if found is None else found[0].search.certain_tokens(found[1])

    def history(self, key: Hashable) -> tuple[HistoryStep, ...]:
        """What a running request's search has considered so far; empty where nobody wants it.

        Each step is there once it is complete, all groups of beams included, and changes no more.
        """
        reading = self._find_reading(key)
        if reading is not None:
            history = reading.captions[0].history
            return () if history is None else history.steps
        found = self._find(key)
        return () if found is None else found[0].search.lanes.history[found[1]]

    def step(self) -> dict[Hashable, Outcome]:
        """Encode and admit who finds room, decode one token of every running request, then read.

        Returns:
            what became of the requests that ended with this step, by key: the captions, or an error
            where encoder, model or search failed, the model gave no numbers or no caption obeys the
            options.

        Raises:
            RuntimeError: if the step model has not taken back so many slots that none is left.
        """
        return self._admit() | self._decode() | self._read()

    def _running(self) -> list[Request]:
        """All that hold a slot."""
        decoded = [request for batch in self._batches for request in batch.requests]
        return decoded + [reading.request for reading in self._readings]

    def _find_reading(self, key: Hashable) -> _Reading | None:
        return next((each for each in self._readings if each.request.key == key), None)

    def _find(self, key: Hashable) -> tuple[_Batch, int] | None:
        for batch in self._batches:
            for lane, request in enumerate(batch.requests):
                if request.key == key:
                    return batch, lane
        return None

    def _admit(self) -> dict[Hashable, Outcome]:
        """Take in who finds room; the errors of those who could not be taken in."""
        self._settle()
        newcomers = self._next_newcomers()
        if not newcomers:
            return {}
        _passed(newcomers, "queue")
        try:
            states = self._encoder.encode(np.stack([request.pixels for request in newcomers]))
            _passed(newcomers, "encode")
            slots = self._step_model.prefill(states)
            _passed(newcomers, "prefill")
        except Exception as error:  # Of whatever kind: it concerns these images and nobody else.
            return {request.key: _fault(error) for request in newcomers}
        ended: dict[Hashable, Outcome] = {}
        for request, slot, own in zip(newcomers, slots.tolist(), states, strict=True):
            if request.plan.options.wants_grounding:
                self._image_states[slot] = tuple(own.mean(axis=0).tolist())
            try:
                self._enter(request, slot)
            except Exception as error:
                ended[request.key] = _fault(error)
                self._give_back([slot])
        return ended

    def _next_newcomers(self) -> list[Request]:
        """Take from the queue, in order, what the limits allow; at least one when none runs."""
        running = self._running()
        rows = sum(request.rows for request in running)
        entries = sum(request.entries for request in running)
        room = self._limits.slots - len(running) - len(self._owed)
        newcomers: list[Request] = []
        while self._waiting and len(newcomers) < min(room, self._limits.max_admissions):
            rows += self._waiting[0].rows
            entries += self._waiting[0].entries
            full = rows > self._limits.max_rows or entries > self._limits.max_entries
            if full and (newcomers or running):
                break
            newcomers.append(self._waiting.popleft())
        return newcomers

    def _enter(self, request: Request, slot: int) -> None:
        self._fresh.append(request)
        kind = search_kind(request.plan.options, self._vocabulary)
        for batch in self._batches:
            if batch.kind == kind:
                batch.search = batch.search.joined(request.plan)
                batch.requests.append(request)
                batch.slots.append(slot)
                return
        search = start_search(request.plan.options, self._vocabulary).joined(request.plan)
        self._batches.append(_Batch(kind, search, [request], [slot]))

    def _decode(self) -> dict[Hashable, Outcome]:
        """One step of all that run; what became of those that ended."""
        steps, ended = self._begin_steps()
        if not steps:
            return ended
        asked = [step for _, step in steps]
        slots = np.array([slot for batch, _ in steps for slot in batch.slots], np.int64)
        try:
            answer = self._step_model.step(_side_by_side(slots, asked))
        except Exception as error:  # Nobody knows whose: the step was everybody's.
            for batch in self._batches:
                ended |= {request.key: _fault(error) for request in batch.requests}
            self._release([(batch, _all(batch)) for batch in self._batches])
            return ended
        finally:
            _passed(self._fresh, "first_step")
            self._fresh = []
        for (batch, step), own in zip(steps, _parted(answer, asked), strict=True):
            ended |= self._advance(batch, step, own)
        leaving = [(batch, batch.search.finished) for batch in self._batches]
        for batch, finished in leaving:
            for lane in np.flatnonzero(finished):
                request, outcome = batch.requests[lane], _outcome(batch.search, int(lane))
                if request.plan.options.wants_grounding and isinstance(outcome, list):
                    self._readings.append(_Reading(request, batch.slots[lane], outcome))
                else:
                    ended[request.key] = outcome
        self._release(leaving)
        return ended

    def _read(self) -> dict[Hashable, Outcome]:
        """Read complete captions, as many as the rows allow; what became of them."""
        now: list[_Reading] = []
        rows = 0
        while self._readings:
            rows += self._readings[0].rows
            if now and rows > self._limits.max_rows:
                break
            now.append(self._readings.popleft())
        if not now:
            return {}
        ended: dict[Hashable, Outcome] = {}
        try:
            without = self._forced_logprobs(None, now)
        except Exception as error:
            ended = {reading.request.key: _fault(error) for reading in now}
        else:
            for reading, own in zip(now, without, strict=True):
                try:
                    ended[reading.request.key] = self._grounded(reading, own)
                except Exception as error:
                    ended[reading.request.key] = _fault(error)
        self._give_back([reading.slot for reading in now])
        return ended

    def _grounded(self, reading: _Reading, without: Float32Array) -> Outcome:
        """A request's captions with their groundings, given what is known without its image."""
        plan = reading.request.plan
        if has_own_logprobs(plan):
            logprobs = [caption.token_logprobs for caption in reading.captions]
            with_image = np.concatenate(logprobs).astype(np.float32)
        else:
            (with_image,) = self._forced_logprobs(reading.slot, [reading])
        if not np.isfinite(with_image - without).all():
            return _no_numbers()
        image_state = self._image_states[reading.slot]
        return grounded(reading.captions, plan, with_image, without, image_state)

    def _forced_logprobs(
        self, slot: int | None, readings: Sequence[_Reading]
    ) -> list[Float32Array]:
        """The model's own log-probabilities of what is read, over a slot's image or none."""
        start = self._vocabulary.special.start
        rows = forced_rows([reading.texts(start) for reading in readings])
        logprobs = self._step_model.forced_logprobs(slot, rows)
        lengths = [
            sum(len(caption.token_ids) for caption in reading.captions) for reading in readings
        ]
        return np.split(logprobs, np.cumsum(lengths)[:-1])

    def _begin_steps(self) -> tuple[list[tuple[_Batch, SearchStep]], dict[Hashable, Outcome]]:
        """What every search wants of the step, and whose search failed to say so."""
        begun: list[tuple[_Batch, SearchStep]] = []
        ended: dict[Hashable, Outcome] = {}
        for batch in list(self._batches):
            try:
                begun.append((batch, batch.search.step()))
            except Exception:  # One of the lanes: each alone shows which.
                for single in self._part(batch):
                    try:
                        begun.append((single, single.search.step()))
                    except Exception as error:
                        ended |= self._fail(single, error)
        return begun, ended

    def _advance(
        self, batch: _Batch, step: SearchStep, answer: StepAnswer
    ) -> dict[Hashable, Outcome]:
        """Let a batch's search take its answer in; who failed at it."""
        ended: dict[Hashable, Outcome] = {}
        without_numbers = _lanes_without_numbers(step, answer)
        try:
            batch.search = step.advance(answer)
        except Exception:  # Again one of the lanes, unless there is only one.
            for lane, single in enumerate(self._part(batch)):
                try:
                    own = single.search.step()
                    single.search = own.advance(_lane_of(answer, step, own, lane))
                except Exception as error:
                    ended |= self._fail(single, error)
                else:
                    if without_numbers[lane]:
                        ended |= self._fail(single, _no_numbers())
            return ended
        for lane in np.flatnonzero(without_numbers):
            ended[batch.requests[lane].key] = _no_numbers()
        self._release([(batch, without_numbers)])
        return ended

    def _part(self, batch: _Batch) -> list[_Batch]:
        """Replace a batch by one of each of its lanes."""
        singles = batch.parted()
        self._batches = [each for each in self._batches if each is not batch] + singles
        return singles

    def _fail(self, batch: _Batch, error: Exception) -> dict[Hashable, Outcome]:
        """End all of a batch's requests."""
        self._release([(batch, _all(batch))])
        return {request.key: _fault(error) for request in batch.requests}

    def _release(self, leaving: Sequence[tuple[_Batch, BoolArray]]) -> None:
        """Let lanes go and give their slots back, with a mask [lanes] for each batch.

        What is still to be read keeps its slot.
        """
        held = {reading.slot for reading in self._readings}
        slots: list[int] = []
        for batch, going in leaving:
            if not going.any():
                continue
            gone = [slot for slot, goes in zip(batch.slots, going, strict=True) if goes]
            slots += [slot for slot in gone if slot not in held]
            if going.all():
                self._batches = [each for each in self._batches if each is not batch]
            else:
                rest = batch.kept(~going)
                batch.search, batch.requests, batch.slots = rest.search, rest.requests, rest.slots
        self._give_back(slots)

    def _give_back(self, slots: list[int]) -> None:
        for slot in slots:
            self._image_states.pop(slot, None)
        self._owed += slots
        if not self._owed:
            return
        try:
            self._step_model.free(np.array(self._owed, np.int64))
        except Exception:  # It still holds them all; `_settle` tries again.
            return
        self._owed = []

    def _settle(self) -> None:
        """Try again to give back what the step model would not take."""
        self._give_back([])
        if len(self._owed) >= self._limits.slots:
            raise RuntimeError("the step model takes no slot back")


def _passed(requests: Sequence[Request], stage: str) -> None:
    for request in requests:
        request.timeline.passed(stage)


def _no_numbers() -> ModelFaultError:
    return ModelFaultError("the model gave no number for a token's probability")


def _fault(error: Exception) -> CaptionServeError:
    """What a request ends with; what is not of our tree becomes a fault, with its cause."""
    if isinstance(error, CaptionServeError):
        return error
    fault = ModelFaultError("the model failed")
    fault.__cause__ = error
    return fault


def _outcome(search: Search, lane: int) -> Outcome:
    try:
        captions = search.captions(lane)
    except Exception as error:
        return _fault(error)
    if captions:
        return captions
    text = "no caption of max_length has them all under the other options"
    return InvalidOptionsError({"force_words": text})


def _all(batch: _Batch) -> BoolArray:
    return np.ones(len(batch.requests), np.bool_)


def _side_by_side(slots: Int64Array, asked: Sequence[SearchStep]) -> StepBatch:
    """What all searches ask for, as one step; row numbers shift as the rows line up."""
    if len(asked) == 1:
        return StepBatch(slots, asked[0].row_counts, asked[0].rows)
    begins = np.cumsum([0, *(len(step.rows.tokens) for step in asked)])
    shifted = [
        dataclasses.replace(
            step.rows,
            edits=dataclasses.replace(step.rows.edits, rows=step.rows.edits.rows + begin),
            probe_rows=step.rows.probe_rows + begin,
            attention_rows=step.rows.attention_rows + begin,
        )
        for step, begin in zip(asked, begins, strict=False)
    ]
    arrays = {
        field.name: np.concatenate([getattr(rows, field.name) for rows in shifted])
        for field in dataclasses.fields(RowRequests)
        if field.name != "edits"
    }
    rows = RowRequests(edits=joined([rows.edits for rows in shifted]), **arrays)
    return StepBatch(slots, np.concatenate([step.row_counts for step in asked]), rows)


def _parted(answer: StepAnswer, asked: Sequence[SearchStep]) -> list[StepAnswer]:
    """Each search's own part of the answer."""
    if len(asked) == 1:
        return [answer]
    candidates = np.cumsum([int(step.rows.candidate_counts.sum()) for step in asked])[:-1]
    probes = np.cumsum([len(step.rows.probe_rows) for step in asked])[:-1]
    attended = np.cumsum([len(step.rows.attention_rows) for step in asked])[:-1]
    return [
        StepAnswer(*parts)
        for parts in zip(
            np.split(answer.logprobs, candidates),
            np.split(answer.tokens, candidates),
            np.split(answer.probe_logprobs, probes),
            np.split(answer.attention, attended),
            strict=True,
        )
    ]


def _lane_of(answer: StepAnswer, step: SearchStep, own: SearchStep, lane: int) -> StepAnswer:
    """What one lane alone would have been answered.

    Args:
        answer: to all lanes.
        step: what all lanes asked.
        own: what the lane alone asks; of its rows it may want fewer candidates.
        lane: which it is.
    """
    lane_of_row = np.repeat(np.arange(len(step.row_counts)), step.row_counts)
    counts = step.rows.candidate_counts
    rank = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    row_of_candidate = np.repeat(np.arange(len(counts)), counts)
    wanted = np.zeros(len(counts), np.int64)
    wanted[lane_of_row == lane] = own.rows.candidate_counts
    candidates = rank < wanted[row_of_candidate]
    return StepAnswer(
        answer.logprobs[candidates],
        answer.tokens[candidates],
        answer.probe_logprobs[lane_of_row[step.rows.probe_rows] == lane],
        answer.attention[lane_of_row[step.rows.attention_rows] == lane],
    )


def _lanes_without_numbers(step: SearchStep, answer: StepAnswer) -> BoolArray:
    """[lanes], whether any candidate of a lane is not a number."""
    lanes = len(step.row_counts)
    if not np.isnan(answer.logprobs).any():
        return np.zeros(lanes, np.bool_)
    lane_of_row = np.repeat(np.arange(lanes), step.row_counts)
    lane_of_candidate = np.repeat(lane_of_row, step.rows.candidate_counts)
    faults = np.bincount(lane_of_candidate[np.isnan(answer.logprobs)], minlength=lanes)
    without: BoolArray = faults > 0
    return without
