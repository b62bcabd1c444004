"""The caption engine: decodes many captions together, one step at a time, without I/O.

Rules:
    1. Every submitted caption ends exactly once: in a `step` result, or by `abandon`.
    2. A caption that ends frees its slot in the same call.
    3. Captions are admitted in the order in which they were submitted; without a free slot they wait.
    4. What a caption becomes does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

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
        self._rows_promised: dict[Hashable, int] = {}

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
        self._rows_promised.clear()
        self._waiting.clear()
        if slots:
            self._step_model.free(np.array(slots, dtype=np.int64))

    def step(self) -> dict[Hashable, list[DecodedCaption]]:
        """Admit who finds room, then decode one token of every live caption.

        Returns:
            the captions that finished with this step, by key.
        """
        self._admit()
        if not self._live:
            return {}
        self._advance()
        finished = {
            key: live.search.captions() for key, live in self._live.items() if live.search.finished
        }
        self._release(list(finished))
        return finished

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
            self._live[task.key] = _Live(int(slot), start_search(task.options, self._special))
            self._rows_promised[task.key] = task.options.num_beams
        self._waiting.extendleft(reversed(refused))

    def _next_tasks(self) -> list[CaptionTask]:
        """Take from the queue, in order, what the row bound allows; always one when none is live."""
        rows = sum(self._rows_promised.values())
        tasks: list[CaptionTask] = []
        while self._waiting:
            rows += self._waiting[0].options.num_beams
            if rows > self._max_rows and (tasks or self._live):
                break
            tasks.append(self._waiting.popleft())
        return tasks

    def _advance(self) -> None:
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
        _hand_out(searches, counts.tolist(), candidates)

    def _release(self, keys: list[Hashable]) -> None:
        if not keys:
            return
        slots = [self._live.pop(key).slot for key in keys]
        for key in keys:
            del self._rows_promised[key]
        self._step_model.free(np.array(slots, dtype=np.int64))


def _hand_out(searches: list[Search], counts: list[int], candidates: Candidates) -> None:
    """Give each search the candidates of its own rows, as many as it asked for."""
    begin = 0
    for search, count in zip(searches, counts, strict=True):
        rows, wanted = slice(begin, begin + count), search.num_candidates
        search.advance(candidates.logprobs[rows, :wanted], candidates.tokens[rows, :wanted])
        begin += count
