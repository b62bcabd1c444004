"""The caption engine: decodes many captions together, one step at a time, without I/O.

Rules:
    1. Every submitted caption ends exactly once: in a `step` result, or by `abandon`.
    2. A caption that ends frees its slot in the same call.
    3. Captions are admitted in the order in which they were submitted; without a free slot they
    wait. 4. What a caption becomes does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.errors import ModelFaultError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import (
    DecodedCaption,
    Search,
    SpecialTokens,
    start_search,
)
from captionserve_server.core.step_model import (
    NO_SLOT,
    Candidates,
    Float32Array,
    StepBatch,
    StepModel,
)

Outcome = list[DecodedCaption] | ModelFaultError


@dataclass(frozen=True)
class CaptionTask:
    """One image to caption.

    Attributes:
        key: the caller's own name for it.
        states: [image tokens, encoder width], float32.
        options: how to decode.
    """

    key: Hashable
    states: Float32Array
    options: DecodingOptions


@dataclass
class _Live:
    slot: int
    search: Search
    num_beams: int


class CaptionEngine:
    """Steps all live captions together and admits waiting ones between steps."""

    def __init__(self, step_model: StepModel, special: SpecialTokens, max_rows: int) -> None:
        """Begin with nothing to do.

        Args:
            step_model: the decoder.
            special: the checkpoint's start and end tokens.
            max_rows: most beams, summed over the live captions; bounds a step's time and memory.
        """
        self._step_model = step_model
        self._special = special
        self._max_rows = max_rows
        self._waiting: deque[CaptionTask] = deque()
        self._live: dict[Hashable, _Live] = {}
        # Images worth offering: not known until the model refuses one, then as many as were freed.
        self._offers: int | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._live

    def submit(self, task: CaptionTask) -> None:
        """Queue a caption."""
        self._waiting.append(task)

    def abandon(self, key: Hashable) -> None:
        """Forget a caption wherever it stands; a key that is not here is ignored."""
        self._waiting = deque(task for task in self._waiting if task.key != key)
        if key in self._live:
            self._release([key])

    def abandon_all(self) -> None:
        """Forget every caption; the engine is empty even when the model fails to free the slots."""
        slots = [live.slot for live in self._live.values()]
        self._live.clear()
        self._offers = None
        self._waiting.clear()
        if slots:
            self._step_model.free(np.array(slots, dtype=np.int64))

    def step(self) -> dict[Hashable, Outcome]:
        """Admit who finds room, then decode one token of every live caption.

        Returns:
            what became of the captions that ended with this step, by key: the captions, or a
            ModelFaultError where the model gave no numbers.
        """
        self._admit()
        if not self._live:
            return {}
        ended: dict[Hashable, Outcome] = dict(self._advance())
        for key, live in self._live.items():
            if key not in ended and live.search.finished:
                ended[key] = live.search.captions()
        self._release(list(ended))
        return ended

    def _admit(self) -> None:
        tasks = self._next_tasks()
        if not tasks:
            return
        slots = self._step_model.prefill(np.stack([task.states for task in tasks]))
        refused: list[CaptionTask] = []
        for task, slot in zip(tasks, slots, strict=True):
            if slot == NO_SLOT:
                refused.append(task)
                continue
            search = start_search(task.options, self._special)
            self._live[task.key] = _Live(int(slot), search, task.options.num_beams)
        self._waiting.extendleft(reversed(refused))
        if refused:
            self._offers = 0
        elif self._offers is not None:
            self._offers = max(0, self._offers - len(tasks))

    def _next_tasks(self) -> list[CaptionTask]:
        """Take from the queue, in order, what the bounds allow; at least one when none is live."""
        rows = sum(live.num_beams for live in self._live.values())
        offers = self._offers if self._live or self._offers is None else max(1, self._offers)
        tasks: list[CaptionTask] = []
        while self._waiting and (offers is None or len(tasks) < offers):
            rows += self._waiting[0].options.num_beams
            if rows > self._max_rows and (tasks or self._live):
                break
            tasks.append(self._waiting.popleft())
        return tasks

    def _advance(self) -> dict[Hashable, ModelFaultError]:
        """One step of all; the faults, by key, of captions that cannot go on."""
        searches = [live.search for live in self._live.values()]
        tokens = [search.tokens for search in searches]
        counts = np.array([len(part) for part in tokens], dtype=np.int64)
        candidates = self._step_model.step(
            StepBatch(
                slots=np.array([live.slot for live in self._live.values()], dtype=np.int64),
                row_counts=counts,
                tokens=np.concatenate(tokens),
                parents=np.concatenate([search.parents for search in searches]),
                num_candidates=max(search.num_candidates for search in searches),
            )
        )
        faulty = _hand_out(searches, counts.tolist(), candidates)
        fault = ModelFaultError("the model gave no number for a token's probability")
        return {key: fault for key, live in self._live.items() if live.search in faulty}

    def _release(self, keys: list[Hashable]) -> None:
        if not keys:
            return
        slots = [self._live.pop(key).slot for key in keys]
        if self._offers is not None:
            self._offers += len(slots)
        self._step_model.free(np.array(slots, dtype=np.int64))


def _hand_out(searches: list[Search], counts: list[int], candidates: Candidates) -> list[Search]:
    """Give each search the candidates of its own rows, as many as it asked for.

    Returns:
        the searches that got none, because there was a NaN among them.
    """
    faulty: list[Search] = []
    begin = 0
    for search, count in zip(searches, counts, strict=True):
        rows, wanted = slice(begin, begin + count), search.num_candidates
        begin += count
        logprobs = candidates.logprobs[rows, :wanted]
        if np.isnan(logprobs).any():
            faulty.append(search)
        else:
            search.advance(logprobs, candidates.tokens[rows, :wanted])
    return faulty
