"""The caption engine: encodes images and decodes many captions together, without I/O.

Encoder and decoder take turns: between two steps the next images are encoded. Each has all cores
while it runs, which does more in the same time than both at once (docs/adr/0011), and how long live
captions wait for newcomers is bounded and the engine's own choice.

Rules, which tests/unit/test_engine.py holds on any mixture of requests:
    1. Every submitted caption ends exactly once: in a `step` result, or by `abandon`.
    2. A caption that ends frees its slot in the same call; no slot is in two captions' hands.
    3. Captions are admitted in the order in which they were submitted. One that finds no room
       waits, and so do all behind it: short ones never pass a long one by.
    4. What a caption becomes does not depend on what else is in the batch.
    5. Live captions stay within the limits of rows and entries; one alone may exceed them.
    6. Newcomers cost live captions at most `max_admissions` encoded images at a step.
    7. An image is encoded once. When the encoder fails, only the images given to it fail.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.errors import (
    CaptionServeError,
    InvalidOptionsError,
    ModelFaultError,
)
from captionserve_server.core.search import (
    Search,
    SearchStep,
    Vocabulary,
    search_kind,
    start_search,
)
from captionserve_server.core.search.logits_processors import joined
from captionserve_server.core.step_model import (
    NO_SLOT,
    BoolArray,
    Float32Array,
    ImageEncoder,
    Int64Array,
    RowRequests,
    ScoreEdits,
    StepAnswer,
    StepBatch,
    StepModel,
    UInt8Array,
)

Outcome = list[DecodedCaption] | CaptionServeError


@dataclass(frozen=True)
class CaptionTask:
    """One image to caption.

    Attributes:
        key: the caller's own name for it.
        pixels: uint8 [3, height, width], of the encoder's size.
        plan: how to decode.
    """

    key: Hashable
    pixels: UInt8Array
    plan: CaptionPlan

    @property
    def rows(self) -> int:
        """Most rows it takes at a step."""
        return self.plan.options.rows

    @property
    def entries(self) -> int:
        """Most keys and values it remembers in each layer."""
        return self.rows * self.plan.options.max_length


@dataclass(frozen=True)
class EngineLimits:
    """What live captions may take together.

    Attributes:
        max_rows: rows, summed over the live captions; bounds a step's time.
        max_entries: rows x max_length, likewise; bounds the memory of keys and values.
        max_admissions: images encoded and taken in between two steps.
    """

    max_rows: int = 128
    max_entries: int = 8192
    max_admissions: int = 4


@dataclass
class _Newcomer:
    """A caption without a slot.

    Attributes:
        task: what is to be captioned.
        states: [image tokens, encoder width] once the image has been encoded.
    """

    task: CaptionTask
    states: Float32Array | None = None


@dataclass
class _Lanes:
    """A search and what stands in its lanes, in their order."""

    search: Search
    tasks: list[CaptionTask] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def leave(self, staying: BoolArray) -> None:
        self.search = self.search.kept(staying)
        self.tasks = [task for task, stays in zip(self.tasks, staying, strict=True) if stays]
        self.slots = [slot for slot, stays in zip(self.slots, staying, strict=True) if stays]


class CaptionEngine:
    """Steps all live captions together and admits waiting ones between steps."""

    def __init__(
        self,
        encoder: ImageEncoder,
        step_model: StepModel,
        vocabulary: Vocabulary,
        limits: EngineLimits,
    ) -> None:
        """Begin with nothing to do.

        Args:
            encoder: asked for at most `max_admissions` images at once.
            step_model: the decoder.
            vocabulary: the checkpoint's tokens.
            limits: what live captions may take together.
        """
        self._encoder = encoder
        self._step_model = step_model
        self._vocabulary = vocabulary
        self._limits = limits
        self._waiting: deque[_Newcomer] = deque()
        self._live: dict[Hashable, _Lanes] = {}
        # Images worth offering: not known until the model refuses one, then as many as were freed.
        self._offers: int | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._live

    @property
    def live(self) -> int:
        """Captions being decoded."""
        return sum(len(lanes.tasks) for lanes in self._live.values())

    @property
    def waiting(self) -> int:
        """Captions that have not found room yet."""
        return len(self._waiting)

    def submit(self, task: CaptionTask) -> None:
        """Queue a caption."""
        self._waiting.append(_Newcomer(task))

    def abandon(self, key: Hashable) -> None:
        """Forget a caption wherever it stands; a key that is not here is ignored."""
        self._waiting = deque(each for each in self._waiting if each.task.key != key)
        found = self._find(key)
        if found is not None:
            lanes, lane = found
            self._release({id(lanes): np.arange(len(lanes.tasks)) == lane})

    def abandon_all(self) -> None:
        """Forget every caption; the engine is empty even when the model fails to free the slots."""
        slots = [slot for lanes in self._live.values() for slot in lanes.slots]
        self._live.clear()
        self._offers = None
        self._waiting.clear()
        if slots:
            self._step_model.free(np.array(slots, dtype=np.int64))

    def best_so_far(self, key: Hashable) -> list[DecodedCaption]:
        """The best captions that a live caption has now; empty for one that has not begun."""
        found = self._find(key)
        return [] if found is None else found[0].search.best_so_far(found[1])

    def certain_tokens(self, key: Hashable) -> tuple[int, ...]:
        """The generated tokens with which a live caption will begin, whatever comes."""
        found = self._find(key)
        return () if found is None else found[0].search.certain_tokens(found[1])

    def step(self) -> dict[Hashable, Outcome]:
        """Encode and admit who finds room, then decode one token of every live caption.

        Returns:
            what became of the captions that ended with this step, by key: the captions, or an
            error where the encoder failed, the model gave no numbers or no caption obeys the
            options.
        """
        return self._admit() | self._decode()

    def _decode(self) -> dict[Hashable, Outcome]:
        if not self._live:
            return {}
        faulty = self._advance()
        ended: dict[Hashable, Outcome] = {}
        leaving: dict[int, BoolArray] = {}
        for lanes, faults in zip(self._live.values(), faulty, strict=True):
            leaving[id(lanes)] = faults | lanes.search.finished
            for lane in np.flatnonzero(leaving[id(lanes)]):
                ended[lanes.tasks[lane].key] = _outcome(lanes, int(lane), faulty=bool(faults[lane]))
        self._release(leaving)
        return ended

    def _find(self, key: Hashable) -> tuple[_Lanes, int] | None:
        for lanes in self._live.values():
            for lane, task in enumerate(lanes.tasks):
                if task.key == key:
                    return lanes, lane
        return None

    def _admit(self) -> dict[Hashable, Outcome]:
        """Take in who finds room; the errors of those whose images could not be encoded."""
        newcomers = self._next_newcomers()
        if not newcomers:
            return {}
        try:
            states = self._encoded(newcomers)
        except CaptionServeError as error:
            return {newcomer.task.key: error for newcomer in newcomers}
        slots = self._step_model.prefill(states)
        refused: list[_Newcomer] = []
        for newcomer, slot in zip(newcomers, slots, strict=True):
            if slot == NO_SLOT:
                refused.append(newcomer)
            else:
                self._enter(newcomer.task, int(slot))
        self._waiting.extendleft(reversed(refused))
        if refused:
            self._offers = 0
        elif self._offers is not None:
            self._offers = max(0, self._offers - len(newcomers))
        return {}

    def _encoded(self, newcomers: Sequence[_Newcomer]) -> Float32Array:
        """The images' states; those that were refused a slot before have theirs."""
        fresh = [newcomer for newcomer in newcomers if newcomer.states is None]
        if fresh:
            encoded = self._encoder.encode(np.stack([each.task.pixels for each in fresh]))
            for newcomer, states in zip(fresh, encoded, strict=True):
                newcomer.states = states
        return np.stack([each.states for each in newcomers if each.states is not None])

    def _enter(self, task: CaptionTask, slot: int) -> None:
        options = task.plan.options
        kind = search_kind(options, self._vocabulary)
        if kind not in self._live:
            self._live[kind] = _Lanes(start_search(options, self._vocabulary))
        lanes = self._live[kind]
        lanes.search = lanes.search.joined(task.plan)
        lanes.tasks.append(task)
        lanes.slots.append(slot)

    def _next_newcomers(self) -> list[_Newcomer]:
        """Take from the queue, in order, what the limits allow; at least one when none is live."""
        live = [task for lanes in self._live.values() for task in lanes.tasks]
        rows, entries = sum(task.rows for task in live), sum(task.entries for task in live)
        most = self._limits.max_admissions
        if self._offers is not None:
            most = min(most, self._offers if live else max(1, self._offers))
        newcomers: list[_Newcomer] = []
        while self._waiting and len(newcomers) < most:
            rows += self._waiting[0].task.rows
            entries += self._waiting[0].task.entries
            full = rows > self._limits.max_rows or entries > self._limits.max_entries
            if full and (newcomers or live):
                break
            newcomers.append(self._waiting.popleft())
        return newcomers

    def _advance(self) -> list[BoolArray]:
        """One step of all; for each search, which lanes got no numbers."""
        all_lanes = list(self._live.values())
        asked = [lanes.search.step() for lanes in all_lanes]
        slots = np.array([slot for lanes in all_lanes for slot in lanes.slots], np.int64)
        answer = self._step_model.step(_batch(slots, asked))
        faulty: list[BoolArray] = []
        for lanes, part, own in zip(all_lanes, asked, _parted(answer, asked), strict=True):
            faulty.append(_lanes_without_numbers(part, own))
            lanes.search = part.advance(own)
        return faulty

    def _release(self, leaving: dict[int, BoolArray]) -> None:
        """Let lanes go and free their slots; `leaving` has a mask for each search by identity."""
        slots: list[int] = []
        for kind, lanes in list(self._live.items()):
            mask = leaving.get(id(lanes))
            if mask is None or not mask.any():
                continue
            slots += [slot for slot, goes in zip(lanes.slots, mask, strict=True) if goes]
            lanes.leave(~mask)
            if not lanes.tasks:
                del self._live[kind]
        if slots:
            if self._offers is not None:
                self._offers += len(slots)
            self._step_model.free(np.array(slots, dtype=np.int64))


def _outcome(lanes: _Lanes, lane: int, *, faulty: bool) -> Outcome:
    if faulty:
        return ModelFaultError("the model gave no number for a token's probability")
    captions = lanes.search.captions(lane)
    if captions:
        return captions
    text = "no caption of max_length has them all under the other options"
    return InvalidOptionsError({"force_words": text})


def _batch(slots: Int64Array, asked: Sequence[SearchStep]) -> StepBatch:
    """What all searches ask for, as one step; row numbers shift as the rows line up."""
    if len(asked) == 1:
        return StepBatch(slots, asked[0].row_counts, asked[0].rows)
    begins = np.cumsum([0, *(len(part.rows.tokens) for part in asked)])
    shifted = [
        dataclasses.replace(
            part.rows,
            edits=dataclasses.replace(part.rows.edits, rows=part.rows.edits.rows + begin),
            probe_rows=part.rows.probe_rows + begin,
            attention_rows=part.rows.attention_rows + begin,
        )
        for part, begin in zip(asked, begins, strict=False)
    ]
    return StepBatch(
        slots=slots,
        row_counts=np.concatenate([part.row_counts for part in asked]),
        rows=_side_by_side(shifted),
    )


def _side_by_side(parts: Sequence[RowRequests]) -> RowRequests:
    edits: ScoreEdits = joined([part.edits for part in parts])
    arrays = {
        name.name: np.concatenate([getattr(part, name.name) for part in parts])
        for name in dataclasses.fields(RowRequests)
        if name.name != "edits"
    }
    return RowRequests(edits=edits, **arrays)


def _parted(answer: StepAnswer, asked: Sequence[SearchStep]) -> list[StepAnswer]:
    """Each search's own part of the answer."""
    if len(asked) == 1:
        return [answer]
    candidates = np.cumsum([int(part.rows.candidate_counts.sum()) for part in asked])[:-1]
    probes = np.cumsum([len(part.rows.probe_rows) for part in asked])[:-1]
    attended = np.cumsum([len(part.rows.attention_rows) for part in asked])[:-1]
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


def _lanes_without_numbers(asked: SearchStep, answer: StepAnswer) -> BoolArray:
    """[lanes], whether any candidate of a lane is not a number."""
    if not np.isnan(answer.logprobs).any():
        return np.zeros(len(asked.row_counts), np.bool_)
    lane_of_row = np.repeat(np.arange(len(asked.row_counts)), asked.row_counts)
    lane_of_candidate = np.repeat(lane_of_row, asked.rows.candidate_counts)
    faults = np.bincount(
        lane_of_candidate[np.isnan(answer.logprobs)], minlength=len(asked.row_counts)
    )
    without: BoolArray = faults > 0
    return without
