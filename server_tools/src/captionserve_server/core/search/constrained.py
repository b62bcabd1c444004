"""Beam search in which every caption contains given words or phrases.

Dynamic beam allocation (Post & Vilar 2018): a hypothesis belongs to the bank of as many tokens of
the required words as it has. At each step the tokens that advance a word are candidates beside the
likely ones, and the beams are filled with the best of each bank in turn, the fullest bank first.
The fullest bank gains at least one token at each step, so every word is there after as many steps
as the words have tokens. Only hypotheses that have all words may end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.search.base import Choices
from captionserve_server.core.search.beam import BeamSearch, Continuations
from captionserve_server.core.search.hypotheses import Hypotheses
from captionserve_server.core.search.logits_processors import forbid_all, joined
from captionserve_server.core.step_model import (
    BoolArray,
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


@dataclass(frozen=True)
class ConstrainedBeamSearch(BeamSearch):
    """Beam search under required words; one group."""

    def _is_valid(self, hypotheses: Hypotheses, lane: int, row: int) -> bool:
        """Whether every word is there; what the deadline cuts off may lack one."""
        return self._requirement(hypotheses, lane, row).complete

    def _requirement(
        self, hypotheses: Hypotheses, lane: int, row: int, *next_token: int
    ) -> Requirement:
        """What a row has and lacks of the words, with the token that may follow it."""
        part = slice(int(self.lanes.given[lane]), int(hypotheses.lengths[lane, row]))
        generated = (*hypotheses.tokens[lane, row, part].tolist(), *next_token)
        return Requirement(self.lanes.plans[lane].words.forced, generated)

    def _wanted(
        self, of_lane: Int64Array, of_row: Int64Array, takes: BoolArray
    ) -> tuple[ScoreEdits, Int64Array, Int64Array]:
        """Also no end for rows that lack a word, and all tokens that bring one forward."""
        edits, _, _ = super()._wanted(of_lane, of_row, takes)
        required = [
            self._requirement(self.lanes.running, lane, row)
            for lane, row in zip(of_lane.tolist(), of_row.tolist(), strict=True)
        ]
        lacking = [number for number, each in enumerate(required) if not each.complete]
        open_end = forbid_all(np.array(lacking, np.int64), self.vocabulary.special.end)
        probes = [
            (number, token)
            for number in np.flatnonzero(takes)
            for token in sorted(required[number].advancing)
        ]
        probe_rows, probe_tokens = np.array(probes, np.int64).reshape(-1, 2).T
        return joined([edits, open_end]), probe_rows, probe_tokens

    def _continuations(self, choices: Choices, own: slice) -> Continuations:
        """The best over all beams, each beam's best, and what advances a word; best first."""
        pools = [self._pool(choices, number) for number in range(len(choices.lanes))]
        most = max(self.rows, *(len(pool) for pool in pools))
        shape = (len(pools), most)
        scores, logprobs = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)
        beams, tokens = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, pool in enumerate(pools):
            for column, entry in enumerate(pool):
                scores[number, column], logprobs[number, column] = entry.score, entry.logprob
                beams[number, column], tokens[number, column] = entry.beam, entry.token
        return Continuations(scores, beams, tokens, logprobs, self._ended(choices.lanes, tokens))

    def _pool(self, choices: Choices, number: int) -> list[_Continuation]:
        """The continuations of one of the lanes that take a token, best first."""
        lane = int(choices.lanes[number])
        logprobs, tokens = choices.logprobs[number], choices.tokens[number]
        sums = self.lanes.running.scores[lane]
        likely = np.argsort(-(logprobs + sums[:, None]), axis=None, kind="stable")
        cells = {divmod(int(cell), logprobs.shape[1]) for cell in likely[: self._per_group()]}
        cells |= {(beam, 0) for beam in range(self.rows)}
        found = {
            (beam, int(tokens[beam, rank])): float(logprobs[beam, rank]) for beam, rank in cells
        }
        found |= {
            (beam, token): value
            for (of, beam, token), value in choices.probes.items()
            if of == lane
        }
        pool = [
            _Continuation(float(sums[beam] + np.float32(logprob)), beam, token, logprob)
            for (beam, token), logprob in found.items()
        ]
        return sorted(
            (entry for entry in pool if entry.score > -np.inf),
            key=lambda entry: (-entry.score, entry.beam, entry.token),
        )

    def _pruned(
        self, lanes: Int64Array, found: Continuations, beams: int
    ) -> tuple[BoolArray, Int64Array]:
        """Those complete captions that have all words; the best of each bank go on in turn."""
        complete = np.zeros(found.scores.shape, np.bool_)
        going_on = np.empty((len(lanes), beams), np.int64)
        for number, lane in enumerate(lanes.tolist()):
            alive = found.scores[number] > -np.inf
            banks, ranks = np.zeros(len(alive), np.int64), np.zeros(len(alive), np.int64)
            members: Counter[int] = Counter()
            for column in np.flatnonzero(alive).tolist():
                beam, token = int(found.beams[number, column]), int(found.tokens[number, column])
                required = self._requirement(self.lanes.running, lane, beam, token)
                complete[number, column] = required.complete
                banks[column] = required.bank
                # Continuations stand best first, so the count within a bank is the rank in it.
                if not found.ended[number, column]:
                    ranks[column] = members[required.bank]
                    members[required.bank] += 1
            goes = alive & ~found.ended[number]
            going_on[number] = np.lexsort((-banks, ranks, ~goes))[:beams]
        # As in plain beam search, but only among those that have all words.
        first = np.cumsum(complete, axis=1) <= beams
        return found.ended & complete & first, going_on


@dataclass(frozen=True)
class _Continuation:
    score: float
    beam: int
    token: int
    logprob: float
