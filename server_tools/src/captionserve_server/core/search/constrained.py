"""Beam search in which every caption contains given words or phrases.

Dynamic beam allocation (Post & Vilar 2018): a hypothesis belongs to the bank of as many tokens of
the required words as it has. At each step the tokens that advance a word are candidates beside the
likely ones, and the beams are filled with the best of each bank in turn, the fullest bank first.
The fullest bank gains at least one token at each step, so every word is there after as many steps
as the words have tokens. Only hypotheses that have all words may end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.search.base import Choices, Vocabulary
from captionserve_server.core.search.beam import BeamLanes, BeamSearch, Continuations
from captionserve_server.core.search.hypotheses import Hypotheses
from captionserve_server.core.search.logits_processors import forbid_all, joined
from captionserve_server.core.search.required_words import Progress
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Int64Array,
    ScoreEdits,
)


@dataclass(frozen=True)
class ConstrainedLanes(BeamLanes):
    """Lanes of beams with what they have of their words.

    Attributes:
        progress: [lanes], of the running rows.
    """

    progress: tuple[Progress, ...]


@dataclass(frozen=True)
class ConstrainedBeamSearch(BeamSearch):
    """Beam search under required words; one group."""

    lanes: ConstrainedLanes

    @classmethod
    def new_lane(cls, vocabulary: Vocabulary, plan: CaptionPlan) -> ConstrainedLanes:
        """One lane before its first step, without any of its words."""
        lane = super().new_lane(vocabulary, plan)
        begun = Progress.begin(plan.words.forced, plan.options.rows)
        return ConstrainedLanes(**vars(lane), progress=(begun,))

    def _is_valid(self, hypotheses: Hypotheses, lane: int, row: int) -> bool:
        """Whether every word is there; what the deadline cuts off may lack one."""
        # Only what has all words is ever completed.
        is_completed = hypotheses is self.lanes.completed
        return is_completed or bool(self.lanes.progress[lane].complete[row])

    def _wanted(
        self, of_lane: Int64Array, of_row: Int64Array, takes: BoolArray
    ) -> tuple[ScoreEdits, Int64Array, Int64Array]:
        """Also no end for rows that lack a word, and all tokens that bring one forward."""
        edits, _, _ = super()._wanted(of_lane, of_row, takes)
        incomplete, probe_rows, probe_tokens = [], [], []
        for lane, progress in enumerate(self.lanes.progress):
            own = np.flatnonzero(of_lane == lane)
            rows = of_row[own]
            incomplete.append(own[~progress.complete[rows]])
            advancing = progress.prospects.advancing[rows] & takes[own, None]
            row, column = np.nonzero(advancing)
            probe_rows.append(own[row])
            probe_tokens.append(progress.words.tokens[column])
        open_end = forbid_all(np.concatenate(incomplete), self.vocabulary.special.end)
        return joined([edits, open_end]), np.concatenate(probe_rows), np.concatenate(probe_tokens)

    def _continuations(self, choices: Choices, own: slice) -> Continuations:
        """What completes captions, best first, then what the beams become, [taking, 2 x rows].

        Where a history is wanted, also the best of the others, [taking, 3 x rows].
        """
        tells = bool(self.lanes.wants_history.any())
        shape = (len(choices.lanes), (3 if tells else 2) * self.rows)
        found = Continuations(
            scores=np.full(shape, -np.inf, np.float32),
            beams=np.zeros(shape, np.int64),
            tokens=np.zeros(shape, np.int64),
            logprobs=np.zeros(shape, np.float32),
            ended=np.zeros(shape, np.bool_),
        )
        for number, lane in enumerate(choices.lanes.tolist()):
            pool = self._pool(choices, number)
            ended = self._ended(choices.lanes[number : number + 1], pool.tokens[None])[0]
            competing, going_on = pool.allocated(self.lanes.progress[lane], ended, self.rows)
            blocks = [(0, competing), (self.rows, going_on)]
            if tells:
                others = np.ones(len(pool.scores), np.bool_)
                others[competing], others[going_on] = False, False
                blocks.append((2 * self.rows, np.flatnonzero(others)[: self.rows]))
            for begin, chosen in blocks:
                place = number, slice(begin, begin + len(chosen))
                found.scores[place] = pool.scores[chosen]
                found.beams[place] = pool.beams[chosen]
                found.tokens[place] = pool.tokens[chosen]
                found.logprobs[place] = pool.logprobs[chosen]
                found.ended[place] = ended[chosen]
        return found

    def _pool(self, choices: Choices, number: int) -> _Pool:
        """The likely continuations of one of the lanes, and those that advance a word."""
        lane = int(choices.lanes[number])
        progress, sums = self.lanes.progress[lane], self.lanes.running.scores[lane]
        logprobs, tokens = choices.logprobs[number], choices.tokens[number]
        # The best over all beams, and each beam's best.
        likely = np.argsort(-(logprobs + sums[:, None]), axis=None, kind="stable")
        chosen = np.zeros(logprobs.shape, np.bool_)
        chosen.flat[likely[: self._per_group()]] = True
        chosen[:, 0] = True
        beams, ranks = np.nonzero(chosen)
        # What advances a word was asked for in any case.
        columns = progress.words.columns(tokens[beams, ranks])
        others = ~progress.prospects.advancing[beams, columns]
        beams, ranks = beams[others], ranks[others]
        asked = choices.probes.of_lane(lane)
        beams = np.concatenate((beams, asked.rows))
        logprob = np.concatenate((logprobs[chosen][others], asked.logprobs))
        token = np.concatenate((tokens[chosen][others], asked.tokens))
        return _Pool(sums[beams] + logprob, beams, token, logprob).best_first()

    def _pruned(
        self, lanes: Int64Array, found: Continuations, beams: int
    ) -> tuple[BoolArray, Int64Array]:
        """As `_continuations` has put them."""
        columns = np.arange(found.scores.shape[1])
        going_on = np.broadcast_to(columns[beams : 2 * beams], (len(lanes), beams))
        return (columns < beams) & (found.scores > -np.inf), going_on

    def _advanced(self, choices: Choices, own: slice, found: Continuations) -> BeamSearch:
        """Also the progress of the new beams."""
        search = super()._advanced(choices, own, found)
        progress = list(self.lanes.progress)
        for number, lane in enumerate(choices.lanes.tolist()):
            progress[lane] = progress[lane].followed_by(
                found.beams[number, self.rows : 2 * self.rows],
                found.tokens[number, self.rows : 2 * self.rows],
            )
        lanes = search.lanes.with_fields(progress=tuple(progress))
        return dataclasses.replace(search, lanes=lanes)


@dataclass(frozen=True)
class _Pool:
    """What one lane's beams may become; fields as those of Continuations, [continuations]."""

    scores: Float32Array
    beams: Int64Array
    tokens: Int64Array
    logprobs: Float32Array

    def best_first(self) -> _Pool:
        """Without what cannot be; among equals the lower beam, then the lower token comes first."""
        order = np.lexsort((self.tokens, self.beams, -self.scores))
        order = order[: int((self.scores > -np.inf).sum())]
        return _Pool(*(array[order] for array in vars(self).values()))

    def allocated(
        self, progress: Progress, ended: BoolArray, beams: int
    ) -> tuple[Int64Array, Int64Array]:
        """Which complete captions, and which go on: the best of each bank in turn.

        Args:
            progress: what the beams have of the words.
            ended: bool [continuations], whether nothing may follow.
            beams: how many there are.

        Returns:
            at most `beams` each.
        """
        columns = progress.words.columns(self.tokens)
        complete = progress.prospects.complete[self.beams, columns]
        # As in plain beam search, but only among those that have all words.
        first = np.flatnonzero(complete)[:beams]
        going = np.flatnonzero(~ended)
        fullest = -progress.prospects.banks[self.beams[going], columns[going]]
        # Continuations stand best first, so the place within a bank is the rank in it.
        by_bank = np.argsort(fullest, kind="stable")
        places = np.arange(len(going))
        begins = np.searchsorted(fullest[by_bank], fullest[by_bank])
        ranks = np.empty(len(going), np.int64)
        ranks[by_bank] = places - begins
        in_turn = np.lexsort((fullest, ranks))
        return first[ended[first]], going[in_turn[:beams]]
