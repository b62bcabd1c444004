"""Beam search in which every caption contains given words or phrases.

Dynamic beam allocation (Post & Vilar 2018): a hypothesis belongs to the bank of as many tokens of
the required words as it has. At each step the tokens that advance a word are candidates beside the
likely ones, and the beams are filled with the best of each bank in turn, the fullest bank first.
The fullest bank gains at least one token at each step, so every word is there after as many steps
as the words have tokens. Only hypotheses that have all words may end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.search.base import Choices, Vocabulary
from captionserve_server.core.search.beam import (
    BeamGroup,
    BeamSearch,
    Continuations,
    extended,
)
from captionserve_server.core.search.hypotheses import NEVER, Hypotheses, columns
from captionserve_server.core.search.logits_processors import forbid_all, joined
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Int64Array,
    ScoreEdits,
)
from captionserve_server.core.words import ForcedWord, TokenIds


class Requirement:
    """What a sequence of tokens has, and lacks, of the required words."""

    def __init__(self, words: Sequence[ForcedWord], generated: TokenIds) -> None:
        """Look through the tokens generated so far."""
        self.met = [any(_occurs(form, generated) for form in _forms(word)) for word in words]
        self._unmet = [
            [_progress(form, generated) for form in _forms(word)]
            for word, is_met in zip(words, self.met, strict=True)
            if not is_met
        ]
        self._words = words

    @property
    def complete(self) -> bool:
        """Whether every word is there."""
        return not self._unmet

    @property
    def bank(self) -> int:
        """Tokens of all words that are there, and of the one that has begun."""
        finished = sum(word.length for word, met in zip(self._words, self.met, strict=True) if met)
        begun = max((have for forms in self._unmet for have, _ in forms), default=0)
        return finished + begun

    @property
    def advancing(self) -> set[int]:
        """The tokens that bring an unmet word forward."""
        return {token for forms in self._unmet for _, token in forms if token is not None}


class _Form:
    """One way of writing a word."""

    def __init__(self, tokens: TokenIds, *, initial: bool) -> None:
        self.tokens = tokens
        self.initial = initial


def _forms(word: ForcedWord) -> list[_Form]:
    forms = [_Form(word.spaced, initial=False)]
    if word.initial is not None:
        forms.append(_Form(word.initial, initial=True))
    return forms


def _occurs(form: _Form, generated: TokenIds) -> bool:
    size = len(form.tokens)
    last = 0 if form.initial else len(generated) - size
    return any(generated[begin : begin + size] == form.tokens for begin in range(last + 1))


def _progress(form: _Form, generated: TokenIds) -> tuple[int, int | None]:
    """How many of the form's tokens end `generated`, and which follows; None where none can."""
    if form.initial:
        have = len(generated)
        fits = have < len(form.tokens) and generated == form.tokens[:have]
        return (have, form.tokens[have]) if fits else (0, None)
    have = next(
        size
        for size in range(len(form.tokens) - 1, -1, -1)
        if size <= len(generated) and generated[len(generated) - size :] == form.tokens[:size]
    )
    return have, form.tokens[have]


class _ConstrainedGroup(BeamGroup):
    """Beams that are allocated to banks; `look` must be told of the continuations first."""

    def __init__(self, beams: int) -> None:
        super().__init__(beams)
        self._complete_now = np.zeros((0, 0), np.bool_)
        self._banks = np.zeros((0, 0), np.int64)

    def look(self, complete: BoolArray, banks: Int64Array) -> None:
        """Whether each continuation has all words, and its bank; [lanes, continuations]."""
        self._complete_now = complete
        self._banks = banks

    def _may_complete(self, extended: Hypotheses) -> BoolArray:
        """Those that have all words, and are among the best of such."""
        ranks = np.cumsum(self._complete_now, axis=1)
        may: BoolArray = self._complete_now & (ranks <= self.beams)
        return may

    def _kept(self, extended: Hypotheses, going_on: Float32Array) -> Int64Array:
        """The best of each bank in turn, the fullest bank first."""
        alive = going_on > NEVER / 2
        kept = np.empty((len(going_on), self.beams), np.int64)
        for lane, (bank_of, lives) in enumerate(zip(self._banks, alive, strict=True)):
            seen: dict[int, int] = {}
            # Continuations stand best first, so the count within a bank is the rank in it.
            ranks = np.zeros(len(bank_of), np.int64)
            for column in np.flatnonzero(lives):
                ranks[column] = seen.get(int(bank_of[column]), 0)
                seen[int(bank_of[column])] = int(ranks[column]) + 1
            order = np.lexsort((np.arange(len(ranks)), -bank_of, ranks, ~lives))
            kept[lane] = order[: self.beams]
        return kept


class ConstrainedBeamSearch(BeamSearch):
    """Beam search under required words."""

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        """Begin without lanes."""
        super().__init__(vocabulary, rows)
        self._probed: list[tuple[int, int, int]] = []
        # Of the rows to run, in their order.
        self._required: list[Requirement] = []

    def _new_group(self, beams: int) -> BeamGroup:
        return _ConstrainedGroup(beams)

    def _live_rows(self) -> BoolArray:
        alive: BoolArray = self._groups[0].running.scores > NEVER / 2
        return alive

    def _is_valid(self, hypotheses: Hypotheses, lane: int, row: int) -> bool:
        """Whether every word is there; what the deadline cuts off may lack one."""
        part = slice(int(self._given[lane]), int(hypotheses.lengths[lane, row]))
        return self._requirement(lane, hypotheses.tokens[lane, row, part]).complete

    def _requirement(self, lane: int, generated: Int64Array) -> Requirement:
        return Requirement(self._plans[lane].words.forced, tuple(generated.tolist()))

    def _row_requirement(self, lane: int, row: int) -> Requirement:
        running = self._running
        part = slice(int(self._given[lane]), int(running.lengths[lane, row]))
        return self._requirement(lane, running.tokens[lane, row, part])

    def _probes(self, lanes: Int64Array, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        takes = self._takes_token()
        self._required = [
            self._row_requirement(lane, row) for lane, row in zip(lanes, rows, strict=True)
        ]
        asked = [
            (number, token)
            for number, required in enumerate(self._required)
            if takes[lanes[number]]
            for token in sorted(required.advancing)
        ]
        self._probed = [(int(lanes[number]), int(rows[number]), token) for number, token in asked]
        return (
            np.array([number for number, _ in asked], np.int64),
            np.array([token for _, token in asked], np.int64),
        )

    def _edits(self, lanes: Int64Array, rows: Int64Array) -> ScoreEdits:
        """The filters', and no end for rows that lack a word; `_probes` has looked for words."""
        lacking = [number for number, found in enumerate(self._required) if not found.complete]
        open_end = forbid_all(np.array(lacking, np.int64), self._vocabulary.special.end)
        return joined([super()._edits(lanes, rows), open_end])

    def _continuations(
        self, group: BeamGroup, choices: Choices, probe_logprobs: Float32Array
    ) -> Continuations:
        """The best over all beams, each beam's best, and what advances a word."""
        assert isinstance(group, _ConstrainedGroup)
        probed = dict(zip(self._probed, probe_logprobs.tolist(), strict=True))
        pools = [self._pool(group, choices, number, probed) for number in range(len(choices.lanes))]
        found = _padded(pools, max(group.beams, *(len(pool) for pool in pools)))
        hypotheses = extended(
            group.running.pick_of(choices.lanes, found.beams),
            scores=found.scores,
            tokens=found.tokens,
            logprobs=found.logprobs,
            origins=columns(choices.origins, found.beams),
            ends=self._end_ids,
            longest=self._limits[choices.lanes],
        )
        group.look(*self._standing(choices.lanes, hypotheses))
        return Continuations(hypotheses, found.beams)

    def _pool(
        self,
        group: BeamGroup,
        choices: Choices,
        number: int,
        probed: dict[tuple[int, int, int], float],
    ) -> list[_Continuation]:
        """One lane's continuations, best first."""
        lane = int(choices.lanes[number])
        logprobs, tokens = choices.logprobs[number], choices.tokens[number]
        sums = group.running.scores[lane]
        likely = np.argsort(-(logprobs + sums[:, None]), axis=None, kind="stable")
        cells = {divmod(int(cell), logprobs.shape[1]) for cell in likely[: self._per_group()]}
        cells |= {(beam, 0) for beam in range(group.beams)}
        found = {
            (beam, int(tokens[beam, rank])): float(logprobs[beam, rank]) for beam, rank in cells
        }
        found |= {(beam, token): value for (of, beam, token), value in probed.items() if of == lane}
        pool = [
            _Continuation(float(sums[beam] + np.float32(logprob)), beam, token, logprob)
            for (beam, token), logprob in found.items()
        ]
        return sorted(
            (entry for entry in pool if entry.score > NEVER / 2),
            key=lambda entry: (-entry.score, entry.beam, entry.token),
        )

    def _standing(self, lanes: Int64Array, hypotheses: Hypotheses) -> tuple[BoolArray, Int64Array]:
        """Completeness and bank of every continuation."""
        complete = np.zeros(hypotheses.scores.shape, np.bool_)
        banks = np.zeros(hypotheses.scores.shape, np.int64)
        for number, column in np.argwhere(hypotheses.scores > NEVER / 2):
            lane = int(lanes[number])
            part = slice(int(self._given[lane]), int(hypotheses.lengths[number, column]))
            requirement = self._requirement(lane, hypotheses.tokens[number, column, part])
            complete[number, column] = requirement.complete
            banks[number, column] = requirement.bank
        return complete, banks


@dataclass(frozen=True)
class _Continuation:
    score: float
    beam: int
    token: int
    logprob: float


@dataclass(frozen=True)
class _Padded:
    """Lanes of continuations, [lanes, most], losers at the end."""

    scores: Float32Array
    beams: Int64Array
    tokens: Int64Array
    logprobs: Float32Array


def _padded(pools: list[list[_Continuation]], most: int) -> _Padded:
    shape = (len(pools), most)
    found = _Padded(
        scores=np.full(shape, NEVER, np.float32),
        beams=np.zeros(shape, np.int64),
        tokens=np.zeros(shape, np.int64),
        logprobs=np.zeros(shape, np.float32),
    )
    for lane, pool in enumerate(pools):
        for column, entry in enumerate(pool):
            found.scores[lane, column] = entry.score
            found.beams[lane, column] = entry.beam
            found.tokens[lane, column] = entry.token
            found.logprobs[lane, column] = entry.logprob
    return found
