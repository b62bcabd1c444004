"""An ImageEncoder and a StepModel without a network.

Every row's candidates follow from its image and its tokens alone. The model keeps each row's whole
history, so that a wrong parent, a lost row or a mixed-up slot changes the candidates and cannot go
unnoticed. It also checks the engine's side of the bargain.
"""

from __future__ import annotations

import functools

import numpy as np
from captionserve_server.core.search.selection import select, top_tokens
from captionserve_server.core.step_model import (
    Float32Array,
    ForcedRows,
    Int64Array,
    StepAnswer,
    StepBatch,
    UInt8Array,
)

VOCABULARY_SIZE = 40
IMAGE_TOKENS = 3
END = 0
START = 1
NO_IMAGE = 7_000_000
"""The number under which the fake knows no image."""


def pixels_of(image: int) -> UInt8Array:
    """An image of which the fakes see the number; uint8 [3, 2, 2]."""
    return np.frombuffer(image.to_bytes(12, "little"), np.uint8).reshape(3, 2, 2)


class FakeEncoder:
    """Every state of an image is the number of the image."""

    def __init__(self) -> None:
        """Begin with nothing encoded."""
        self.batches: list[int] = []

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """uint8 [images, 3, 2, 2] to float32 [images, 2, 3]."""
        self.batches.append(len(pixels))
        numbers = [int.from_bytes(image.tobytes(), "little") for image in pixels]
        return np.tile(np.array(numbers, np.float32)[:, None, None], (1, 2, 3))


class FakeStepModel:
    """A deterministic decoder of `capacity` slots."""

    def __init__(self, capacity: int) -> None:
        """Begin with every slot free."""
        self.capacity = capacity
        self.histories: dict[int, tuple[float, list[tuple[int, ...]]]] = {}
        self.most_rows = 0
        self.steps = 0
        self.prefills: list[int] = []
        self.readings: list[int] = []
        self._next_slot = 100

    def prefill(self, states: Float32Array) -> Int64Array:
        """A slot for each image, which is its first state's number; IndexError without room."""
        if len(self.histories) + len(states) > self.capacity:
            raise IndexError("there is no room")
        self.prefills.append(len(states))
        slots = self._next_slot + np.arange(len(states))
        self._next_slot += len(states)
        for slot, image in zip(slots.tolist(), states[:, 0, 0].tolist(), strict=True):
            self.histories[slot] = (image, [()])
        return slots

    def step(self, batch: StepBatch) -> StepAnswer:
        """Candidates of each row from its history."""
        assert len(set(batch.slots.tolist())) == len(batch.slots), "a slot is used twice"
        requests = batch.rows
        assert batch.row_counts.sum() == len(requests.tokens) == len(requests.parents)
        self.steps += 1
        self.most_rows = max(self.most_rows, len(requests.tokens))
        rows: list[Float32Array] = []
        begin = 0
        for slot, count in zip(batch.slots.tolist(), batch.row_counts.tolist(), strict=True):
            image, before = self.histories[slot]
            part = slice(begin, begin + count)
            after = [
                (*before[parent], token)
                for parent, token in zip(
                    requests.parents[part].tolist(), requests.tokens[part].tolist(), strict=True
                )
            ]
            self.histories[slot] = (image, after)
            rows += [logprobs(image, history) for history in after]
            begin += count
        # Logits may be off by any number; the normaliser takes it out again.
        shift = np.float32(3.0)
        normalisers = np.full(len(rows), shift, np.float32)
        found, tokens, probes = select(np.stack(rows) + shift, normalisers, requests, top_tokens)
        return StepAnswer(found, tokens, probes, self._attention(batch))

    def free(self, slots: Int64Array) -> None:
        """Forget; freeing what is not held is an error, and frees nothing."""
        assert all(slot in self.histories for slot in slots.tolist())
        for slot in slots.tolist():
            del self.histories[slot]

    def forced_logprobs(self, slot: int | None, rows: ForcedRows) -> Float32Array:
        """What each row makes of the tokens asked for, from all that it sees."""
        image = NO_IMAGE if slot is None else self.histories[slot][0]
        self.readings.append(len(rows.tokens))
        assert rows.sees.diagonal().all()
        histories = []
        for sees, position in zip(rows.sees, rows.positions.tolist(), strict=True):
            seen = np.flatnonzero(sees)
            assert rows.positions[seen].tolist() == list(range(position + 1))
            histories.append(tuple(rows.tokens[seen].tolist()))
        probes = zip(rows.probe_rows.tolist(), rows.probe_tokens.tolist(), strict=True)
        return np.array([logprobs(image, histories[row])[token] for row, token in probes])

    def _attention(self, batch: StepBatch) -> Float32Array:
        """Each attended row's last token, length and image, as if they were attention."""
        rows = [
            (history[-1], len(history), image)
            for slot in batch.slots.tolist()
            for image, histories in [self.histories[slot]]
            for history in histories
        ]
        attention: Float32Array = np.array(rows, np.float32)[batch.rows.attention_rows]
        return attention


@functools.lru_cache(maxsize=100_000)
def logprobs(image: float, history: tuple[int, ...]) -> Float32Array:
    """Log-probabilities after a history; float32 [VOCABULARY_SIZE]."""
    generator = np.random.default_rng([int(image), *history])
    logits = generator.normal(0, 2, VOCABULARY_SIZE)
    logits[END] += 0.4 * (len(history) - 4)
    result: Float32Array = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    return result
