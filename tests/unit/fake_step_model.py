"""A StepModel without a network: every row's candidates follow from its image and its tokens alone.

It keeps each row's whole history, so that a wrong parent, a lost row or a mixed-up slot changes the
candidates and cannot go unnoticed. It also checks the engine's side of the bargain.
"""

from __future__ import annotations

import numpy as np
from captionserve_server.core.step_model import (
    NO_SLOT,
    Candidates,
    Float32Array,
    Int64Array,
    StepBatch,
)

VOCABULARY_SIZE = 23
END = 0
START = 1


class FakeStepModel:
    """A deterministic decoder of `capacity` slots."""

    def __init__(self, capacity: int) -> None:
        """Begin with every slot free."""
        self.capacity = capacity
        self.histories: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        self.most_rows = 0
        self.offered = 0
        self._next_slot = 100

    def prefill(self, states: Float32Array) -> Int64Array:
        """Slots for as many images as fit; an image is its first state's number."""
        self.offered += len(states)
        slots = np.full(len(states), NO_SLOT, np.int64)
        for image in range(min(len(states), self.capacity - len(self.histories))):
            slots[image] = self._next_slot
            self.histories[self._next_slot] = (float(states[image, 0, 0]), [()])
            self._next_slot += 1
        return slots

    def step(self, batch: StepBatch) -> Candidates:
        """Candidates of each row from its history."""
        assert len(set(batch.slots.tolist())) == len(batch.slots), "a slot is used twice"
        assert batch.row_counts.sum() == len(batch.tokens) == len(batch.parents)
        self.most_rows = max(self.most_rows, len(batch.tokens))
        rows: list[Float32Array] = []
        begin = 0
        for slot, count in zip(batch.slots.tolist(), batch.row_counts.tolist(), strict=True):
            image, before = self.histories[slot]
            part = slice(begin, begin + count)
            after = [
                (*before[parent], token)
                for parent, token in zip(
                    batch.parents[part].tolist(), batch.tokens[part].tolist(), strict=True
                )
            ]
            self.histories[slot] = (image, after)
            rows += [logprobs(image, history) for history in after]
            begin += count
        scores = np.stack(rows)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : batch.num_candidates]
        return Candidates(np.take_along_axis(scores, best, axis=1), best)

    def free(self, slots: Int64Array) -> None:
        """Forget; freeing what is not held is an error."""
        for slot in slots.tolist():
            del self.histories[slot]


def logprobs(image: float, history: tuple[int, ...]) -> Float32Array:
    """Log-probabilities after a history; float32 [VOCABULARY_SIZE]."""
    generator = np.random.default_rng([int(image), *history])
    logits = generator.normal(0, 2, VOCABULARY_SIZE)
    logits[END] += 0.4 * (len(history) - 4)
    result: Float32Array = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    return result
