"""Beam search with transformers' stopping rules, alone and in diverse groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.history import DROPPED, FINISHED, LIKELIEST, HistoryStep
from captionserve_server.core.search.base import Choices, Lanes, Search, Vocabulary
from captionserve_server.core.search.hypotheses import (
    Hypotheses,
    best,
    columns,
    is_one_of,
    length_penalised,
    shared_beginning,
)
from captionserve_server.core.step_model import BoolArray, Float32Array, Float64Array, Int64Array


@dataclass(frozen=True)
class BeamLanes(Lanes):
    """Lanes of beams; the beams of a group stand side by side among the rows.

    Attributes:
        completed: the best completed captions of each group, in the group's rows, best first.
        stops_when_full: bool [lanes], early_stopping True.
        hopes_for_longest: bool [lanes], early_stopping "never" where longer captions score better.
        diversity_penalty: float64 [lanes].
    """

    completed: Hypotheses
    stops_when_full: BoolArray
    hopes_for_longest: BoolArray
    diversity_penalty: Float64Array


@dataclass(frozen=True)
class Continuations:
    """What a group's beams may become, best first; every array is [taking, continuations].

    Attributes:
        scores: float32, sums of log-probabilities; -inf where there is nothing to become.
        beams: which of the lane's rows each continues.
        tokens: what follows it.
        logprobs: float32, of the tokens.
        ended: bool, whether nothing may follow.
    """

    scores: Float32Array
    beams: Int64Array
    tokens: Int64Array
    logprobs: Float32Array
    ended: BoolArray


@dataclass(frozen=True)
class BeamSearch(Search):
    """Beams in one group, or in several that are kept apart (Vijayakumar et al. 2016).

    A later group's log-probabilities are lowered by diversity_penalty for each beam of an earlier
    group that has just taken the same token. A group is finished when none of its beams is alive.

    Attributes:
        groups: groups of equal size that the rows are parted into.
    """

    lanes: BeamLanes
    groups: int = 1

    normalises_first = True

    @classmethod
    def new_lane(cls, vocabulary: Vocabulary, plan: CaptionPlan) -> BeamLanes:
        """One lane before its first step."""
        options = plan.options
        lane = super().new_lane(vocabulary, plan)
        # The first beam of each group stands for all of them before the first token.
        lane.running.scores[0, :: options.rows // options.num_beam_groups] = 0.0
        return BeamLanes(
            **vars(lane),
            completed=Hypotheses.none(1, options.rows, options.max_length),
            stops_when_full=np.array([options.early_stopping is True], np.bool_),
            hopes_for_longest=np.array(
                [options.early_stopping == "never" and options.length_penalty > 0], np.bool_
            ),
            diversity_penalty=np.array([options.diversity_penalty], np.float64),
        )

    @property
    def finished(self) -> BoolArray:
        """[lanes], whether better captions are out of reach or out of bounds in every group."""
        finished: BoolArray = ~self.lanes.running.alive.any(axis=1)
        return finished

    def captions(self, lane: int) -> list[DecodedCaption]:
        """The best completed captions of all groups, as many as may be returned."""
        return self._best(lane, running=None)

    def best_so_far(self, lane: int) -> list[DecodedCaption]:
        """The best captions among the completed ones and those that still run."""
        lanes = self.lanes
        if lanes.seen[lane] < lanes.given[lane]:
            return []
        lengths = lanes.running.lengths[lane] - lanes.given[lane]
        scores = length_penalised(lanes.running.scores[lane], lengths, lanes.length_penalty[[lane]])
        return self._best(lane, running=scores)

    def certain_tokens(self, lane: int) -> tuple[int, ...]:
        """What all beams that may still win share, completed ones included."""
        pools = self.lanes.running, self.lanes.completed
        given = self.lanes.given[lane]
        rows = [pool.tokens[lane, pool.alive[lane], given:] for pool in pools]
        lengths = [pool.lengths[lane, pool.alive[lane]] - given for pool in pools]
        return shared_beginning(np.concatenate(rows), np.concatenate(lengths))

    def _best(self, lane: int, running: Float32Array | None) -> list[DecodedCaption]:
        """The best completed captions, and running ones where their scores, [rows], are given.

        Among equals the earlier group comes first, and in a group what is completed.
        """
        completed, size = self.lanes.completed, self.rows // self.groups
        scored: list[tuple[float, Hypotheses, int]] = []
        for first in range(0, self.rows, size):
            for pool, scores in (
                (completed, completed.scores[lane]),
                (self.lanes.running, running),
            ):
                if scores is not None:
                    alive = first + np.flatnonzero(scores[first : first + size] > -np.inf)
                    scored += [(float(scores[row]), pool, int(row)) for row in alive]
        scored = [entry for entry in scored if self._is_valid(entry[1], lane, entry[2])]
        scored.sort(key=lambda entry: -entry[0])
        wanted = scored[: self.lanes.plans[lane].options.candidates]
        return [self._caption(pool, lane, row, score) for score, pool, row in wanted]

    def _is_valid(self, hypotheses: Hypotheses, lane: int, row: int) -> bool:
        """Whether a row is a caption that may be returned."""
        return True

    def _live_rows(self) -> BoolArray:
        return self.lanes.running.alive

    def _candidates_per_row(self) -> int:
        """Enough that a group's beams go on when every beam's best choice is to end.

        Groups that follow others may lose as many of them as the others have beams.
        """
        penalised = self.rows - self.rows // self.groups
        return min(self._per_group() + penalised, self.vocabulary.size)

    def _per_group(self) -> int:
        return max(2, 1 + len(self.vocabulary.end_ids)) * (self.rows // self.groups)

    def _extended(self, choices: Choices) -> BeamSearch:
        search, size = self, self.rows // self.groups
        taken = np.zeros((len(choices.lanes), 0), np.int64)
        for first in range(0, self.rows, size):
            own = slice(first, first + size)
            found = search._continuations(_lowered(choices, own, taken, self.lanes), own)
            if own.stop < self.rows:
                taken = np.concatenate((taken, self._taken(found, size)), axis=1)
            search = search._advanced(choices, own, found)
        return search

    def _taken(self, found: Continuations, beams: int) -> Int64Array:
        """The tokens that a group takes to go on with, [taking, beams]; -1 where it is finished.

        At the length limit, where nothing goes on, those that it would have taken.
        """
        ends = is_one_of(found.tokens, self.vocabulary.end_ids)
        tokens = columns(found.tokens, np.argsort(ends, axis=1, kind="stable")[:, :beams])
        going = (found.scores > -np.inf).any(axis=1, keepdims=True)
        return np.where(going, tokens, -1)

    def _continuations(self, choices: Choices, own: slice) -> Continuations:
        """The best continuations over all beams of a group, those in the rows `own`."""
        sums = self.lanes.running.scores[choices.lanes, own]
        totals = (choices.logprobs[:, own] + sums[:, :, None]).reshape(len(sums), -1)
        chosen = best(totals, self._per_group())
        tokens = columns(choices.tokens[:, own].reshape(totals.shape), chosen)
        return Continuations(
            scores=columns(totals, chosen),
            beams=own.start + chosen // choices.logprobs.shape[2],
            tokens=tokens,
            logprobs=columns(choices.logprobs[:, own].reshape(totals.shape), chosen),
            ended=self._ended(choices.lanes, tokens),
        )

    def _ended(self, lanes: Int64Array, tokens: Int64Array) -> BoolArray:
        """Whether each token that some lanes take, [taking, continuations], is the last."""
        at_limit = self.lanes.seen[lanes] + 1 >= self.lanes.longest[lanes]
        return is_one_of(tokens, self.vocabulary.end_ids) | at_limit[:, None]

    def _pruned(
        self, lanes: Int64Array, found: Continuations, beams: int
    ) -> tuple[BoolArray, Int64Array]:
        """Which continuations complete captions, and which go on as beams.

        Only the first ones may complete a caption: the rest are there to keep the search alive.

        Args:
            lanes: [taking].
            found: what their beams may become.
            beams: how many there are in the group.

        Returns:
            bool [taking, continuations], and columns [taking, beams], in which continuations that
            have ended or are not there come last.
        """
        first = np.arange(found.scores.shape[1]) < beams
        return found.ended & first, best(np.where(found.ended, -np.inf, found.scores), beams)

    def _advanced(self, choices: Choices, own: slice, found: Continuations) -> BeamSearch:
        """The search after a group, the rows `own`, has completed captions, pruned and stopped."""
        lanes, at, beams = self.lanes, choices.lanes, own.stop - own.start
        competing, kept = self._pruned(at, found, beams)
        generated = lanes.seen[at] + 1 - lanes.given[at]

        # Continuations that ended compete with the completed captions.
        completed = lanes.completed
        if competing.any():
            extended = lanes.running.extended(
                at,
                found.beams,
                scores=length_penalised(
                    found.scores, generated[:, None], lanes.length_penalty[at, None]
                ),
                tokens=found.tokens,
                logprobs=found.logprobs,
                origins=columns(choices.origins, found.beams),
            )
            extended.scores[~competing] = -np.inf
            pool = completed.pick(at, np.arange(own.start, own.stop)).beside(extended)
            winners = pool.pick(np.arange(len(at)), best(pool.scores, beams))
            completed = completed.replaced(at, own, winners)

        # The best of the others are the new beams.
        continued = columns(found.beams, kept)
        origins = columns(choices.origins, continued)
        scores = np.where(columns(found.ended, kept), -np.inf, columns(found.scores, kept))

        # A full group stops where no beam can become better than its worst completed caption.
        worst = completed.scores[at, own].min(axis=1)
        hoped = np.where(
            lanes.hopes_for_longest[at], lanes.longest[at] - lanes.given[at], generated
        )
        attainable = length_penalised(scores.max(axis=1), hoped, lanes.length_penalty[at])
        full = worst > -np.inf
        stops = full & (lanes.stops_when_full[at] | ~(attainable > worst))
        scores[stops] = -np.inf

        running = lanes.running.extended(
            at,
            continued,
            scores=scores,
            tokens=columns(found.tokens, kept),
            logprobs=columns(found.logprobs, kept),
            origins=origins,
        )
        parents = lanes.parents.copy()
        parents[at, own] = origins
        lanes = lanes.with_fields(
            running=lanes.running.replaced(at, own, running),
            completed=completed,
            parents=parents,
        )
        if lanes.wants_history.any():
            # Which row each continuation is from now on.
            became = np.where(competing, FINISHED, DROPPED)
            group, place = np.nonzero(scores > -np.inf)
            became[group, kept[group, place]] = own.start + place
            lanes = lanes.with_fields(history=self._remembered(choices, own, found, became))
        return dataclasses.replace(self, lanes=lanes)

    def _remembered(
        self, choices: Choices, own: slice, found: Continuations, became: Int64Array
    ) -> tuple[tuple[HistoryStep, ...], ...]:
        """The lanes' histories with what a group, the rows `own`, has done in this step.

        Args:
            choices: what might have followed.
            own: the group's rows.
            found: what its beams might have become.
            became: [taking, continuations], the row that each became, DROPPED or FINISHED.
        """
        longer = list(self.lanes.history)
        for number in np.flatnonzero(self.lanes.wants_history[choices.lanes]).tolist():
            lane = int(choices.lanes[number])
            scores, rows = found.scores[number], became[number]
            order = np.argsort(-scores, kind="stable")[: int((scores > -np.inf).sum())]
            dropped = rows[order] == DROPPED
            room = 2 * (own.stop - own.start) - int((~dropped).sum())
            told = order[~dropped | (np.cumsum(dropped) <= room)]
            step = HistoryStep(
                parents=found.beams[number, told],
                tokens=found.tokens[number, told],
                logprobs=found.logprobs[number, told],
                scores=scores[told],
                rows=rows[told],
                origins=choices.origins[number],
                # Copies: a view would keep all candidates of the step.
                likeliest_tokens=choices.tokens[number, :, :LIKELIEST].copy(),
                likeliest_logprobs=choices.logprobs[number, :, :LIKELIEST].copy(),
            )
            if own.start == 0:
                longer[lane] = (*longer[lane], step)
            else:
                *before, others = longer[lane]
                longer[lane] = (*before, others.followed_by(step))
        return tuple(longer)


def _lowered(choices: Choices, own: slice, taken: Int64Array, lanes: BeamLanes) -> Choices:
    """The choices after the penalty for tokens that earlier groups have taken, [taking, n]."""
    if not taken.shape[1]:
        return choices
    penalties = lanes.diversity_penalty[choices.lanes].astype(np.float32)
    same = choices.tokens[:, own, :, None] == taken[:, None, None, :]
    logprobs = choices.logprobs.copy()
    logprobs[:, own] -= penalties[:, None, None] * same.sum(axis=3, dtype=np.float32)
    return dataclasses.replace(choices, logprobs=logprobs)
