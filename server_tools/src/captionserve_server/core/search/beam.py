"""Beam search with transformers' stopping rules, alone and in diverse groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.search.base import (
    Choices,
    Search,
    Vocabulary,
    is_one_of,
    length_penalised,
    shared_beginning,
)
from captionserve_server.core.search.hypotheses import NEVER, Hypotheses, best, columns
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int64Array,
)


@dataclass
class Limits:
    """The options of each lane that beams obey; every array is [lanes].

    Attributes:
        given: tokens before the first generated one.
        longest: tokens allowed, the given ones included.
        length_penalty: float64.
        stops_when_full: early_stopping "true".
        hopes_for_longest: early_stopping "never", where longer captions score better.
    """

    given: Int64Array
    longest: Int64Array
    length_penalty: Float64Array
    stops_when_full: BoolArray
    hopes_for_longest: BoolArray

    @classmethod
    def of(cls, plans: list[CaptionPlan], given: Int64Array, longest: Int64Array) -> Limits:
        """The limits that plans ask for."""
        options = [plan.options for plan in plans]
        penalty = np.array([option.length_penalty for option in options], np.float64)
        stopping = np.array([option.early_stopping for option in options], np.object_)
        return cls(
            given=given,
            longest=longest,
            length_penalty=penalty,
            stops_when_full=stopping == "true",
            hopes_for_longest=(stopping == "never") & (penalty > 0),
        )

    def lanes(self, index: Int64Array) -> Limits:
        """Those of the lanes at `index`."""
        return Limits(
            self.given[index],
            self.longest[index],
            self.length_penalty[index],
            self.stops_when_full[index],
            self.hopes_for_longest[index],
        )


@dataclass(frozen=True)
class Continuations:
    """What beams may become, best first; [lanes, continuations].

    Attributes:
        hypotheses: the beams with one more token; scores are sums.
        beams: the beam that each continues.
    """

    hypotheses: Hypotheses
    beams: Int64Array


class BeamGroup:
    """The beams of one group, for many lanes: those that run, and the best completed ones."""

    def __init__(self, beams: int) -> None:
        """Begin without lanes."""
        self.beams = beams
        self.running = Hypotheses.placeholders(0, beams, 0)
        self.completed = Hypotheses.placeholders(0, beams, 0)
        self.improvable = np.zeros(0, np.bool_)
        self.finished = np.zeros(0, np.bool_)

    def join(self, running: Hypotheses) -> None:
        """Take a lane in; its first beam stands for all before the first token."""
        running.scores[:] = NEVER
        running.scores[:, 0] = 0.0
        longest = running.tokens.shape[2]
        self.running = self.running.followed_by(running)
        self.completed = self.completed.followed_by(Hypotheses.placeholders(1, self.beams, longest))
        self.improvable = np.append(self.improvable, True)
        self.finished = np.append(self.finished, False)

    def leave(self, staying: BoolArray) -> None:
        """Keep the lanes that stay."""
        self.running = self.running.lanes(staying)
        self.completed = self.completed.lanes(staying)
        self.improvable = self.improvable[staying]
        self.finished = self.finished[staying]

    def advance(self, lanes: Int64Array, found: Continuations, limits: Limits) -> Int64Array:
        """Complete and prune; the beam that each running one continues, [lanes, beams].

        Args:
            lanes: which lanes take a token.
            found: their continuations; only the best may complete a caption, see `_may_complete`.
            limits: of those lanes.
        """
        extended = found.hypotheses
        self._complete(lanes, extended, limits)
        going_on = np.where(extended.ended, extended.scores + NEVER, extended.scores)
        kept = self._kept(extended, going_on)
        running = extended.pick(kept)
        running.scores = columns(going_on, kept)
        self.running.put(lanes, running)
        self._stop(lanes, limits, nothing_left=~(going_on > NEVER / 2).any(axis=1))
        return columns(found.beams, kept)

    def _kept(self, extended: Hypotheses, going_on: Float32Array) -> Int64Array:
        """Which continuations go on as beams, [lanes, beams]."""
        return best(going_on, self.beams)

    def _may_complete(self, extended: Hypotheses) -> BoolArray:
        """Which continuations may enter the completed ones if they have ended.

        Only the first of them: the rest are there to keep the search alive.
        """
        may: BoolArray = np.arange(extended.scores.shape[1]) < self.beams
        return np.broadcast_to(may, extended.scores.shape)

    def _complete(self, lanes: Int64Array, extended: Hypotheses, limits: Limits) -> None:
        """Let continuations that ended compete with the completed captions."""
        ended = extended.ended & self._may_complete(extended)
        if not ended.any():
            return
        generated = extended.lengths - limits.given[:, None]
        scores = length_penalised(extended.scores, generated, limits.length_penalty[:, None])
        completed = self.completed.lanes(lanes)
        full = limits.stops_when_full & completed.ended.all(axis=1)
        closed = full | ~self.improvable[lanes]
        scores = np.where(closed[:, None], scores + NEVER, scores)
        scores = np.where(ended, scores, scores + NEVER)
        merged = completed.beside(dataclasses.replace(extended, scores=scores, ended=ended))
        self.completed.put(lanes, merged.pick(best(merged.scores, self.beams)))

    def _stop(self, lanes: Int64Array, limits: Limits, nothing_left: BoolArray) -> None:
        full = self.completed.ended[lanes].all(axis=1)
        lengths = self.running.lengths[lanes, 0] - limits.given
        hoped = np.where(limits.hopes_for_longest, limits.longest - limits.given, lengths)
        highest = self.running.scores[lanes].max(axis=1)
        attainable = length_penalised(highest, hoped, limits.length_penalty)
        worst = np.where(full, self.completed.scores[lanes].min(axis=1), NEVER)
        improvable = self.improvable[lanes] & (attainable > worst)
        self.improvable[lanes] = improvable
        self.finished[lanes] = ~improvable | (full & limits.stops_when_full) | nothing_left


class BeamSearch(Search):
    """Beams in one group, or in several that are kept apart (Vijayakumar et al. 2016).

    A later group's log-probabilities are lowered by diversity_penalty for each beam of an earlier
    group that has just taken the same token.
    """

    normalises_first = True

    def __init__(self, vocabulary: Vocabulary, rows: int, groups: int = 1) -> None:
        """Begin without lanes; `rows` beams in `groups` groups of equal size."""
        super().__init__(vocabulary, rows)
        self._groups = [self._new_group(rows // groups) for _ in range(groups)]
        self._note_options()

    def join(self, plan: CaptionPlan) -> None:
        """Take a caption in, as the last lane."""
        super().join(plan)
        for group in self._groups:
            group.join(self._running.lanes(np.array([-1])).pick(np.arange(group.beams)[None]))

    def leave(self, staying: BoolArray) -> None:
        """Keep the lanes that stay, [lanes]."""
        super().leave(staying)
        for group in self._groups:
            group.leave(staying)

    @property
    def finished(self) -> BoolArray:
        """[lanes], whether better captions are out of reach or out of bounds in every group."""
        finished: BoolArray = np.all([group.finished for group in self._groups], axis=0)
        return finished

    def captions(self, lane: int) -> list[DecodedCaption]:
        """The best num_return_sequences completed captions of all groups."""
        return self._best(lane, [group.completed for group in self._groups])

    def best_so_far(self, lane: int) -> list[DecodedCaption]:
        """The best captions among the completed ones and those that still run."""
        if self._seen[lane] < self._given[lane]:
            return []
        penalty = np.array(self._plans[lane].options.length_penalty, np.float64)
        pools: list[Hypotheses] = []
        for group in self._groups:
            # Other lanes may stand before their first token; theirs are not looked at.
            lengths = np.maximum(group.running.lengths - self._given[:, None], 1)
            scores = length_penalised(group.running.scores, lengths, penalty)
            alive = (group.running.scores > NEVER / 2) & ~group.finished[:, None]
            running = dataclasses.replace(group.running, scores=scores, ended=alive)
            pools += [group.completed, running]
        return self._best(lane, pools)

    def certain_tokens(self, lane: int) -> tuple[int, ...]:
        """What all beams that may still win share, completed ones included."""
        rows: list[Int64Array] = []
        lengths: list[Int64Array] = []
        for group in self._groups:
            alive = (group.running.scores[lane] > NEVER / 2) & ~group.finished[lane]
            for hypotheses, chosen in (
                (group.running, alive),
                (group.completed, group.completed.ended[lane]),
            ):
                rows.append(hypotheses.tokens[lane, chosen, self._given[lane] :])
                lengths.append(hypotheses.lengths[lane, chosen] - self._given[lane])
        return shared_beginning(np.concatenate(rows), np.concatenate(lengths))

    def _note_options(self) -> None:
        super()._note_options()
        self._obeyed = Limits.of(self._plans, self._given, self._limits)

    def _new_group(self, beams: int) -> BeamGroup:
        return BeamGroup(beams)

    def _best(self, lane: int, pools: list[Hypotheses]) -> list[DecodedCaption]:
        scored = [
            (float(pool.scores[lane, row]), pool, int(row))
            for pool in pools
            for row in np.flatnonzero(pool.ended[lane])
            if self._is_valid(pool, lane, int(row))
        ]
        scored.sort(key=lambda entry: -entry[0])
        wanted = scored[: self._plans[lane].options.num_return_sequences]
        return [self._caption(pool, lane, row, score) for score, pool, row in wanted]

    def _is_valid(self, hypotheses: Hypotheses, lane: int, row: int) -> bool:
        """Whether a row is a caption that may be returned."""
        return True

    def _candidates_per_row(self) -> int:
        """Enough that a group's beams go on when every beam's best choice is to end.

        Groups that follow others may lose as many of them as the others have beams.
        """
        return min(self._per_group() + self._penalised(), self._vocabulary.size)

    def _per_group(self) -> int:
        return max(2, 1 + len(self._end_ids)) * self._groups[0].beams

    def _penalised(self) -> int:
        return self._rows - self._groups[-1].beams

    def _live_rows(self) -> BoolArray:
        return np.concatenate(
            [np.repeat(~group.finished[:, None], group.beams, axis=1) for group in self._groups],
            axis=1,
        )

    def _extend(self, choices: Choices, probe_logprobs: Float32Array) -> None:
        taken = np.zeros((len(choices.lanes), 0), np.int64)
        for number, group in enumerate(self._groups):
            own = slice(number * group.beams, (number + 1) * group.beams)
            going = np.flatnonzero(~group.finished[choices.lanes])
            if not len(going):
                continue
            part = self._apart_from(taken[going], _part(choices, going, own))
            found = self._continuations(group, part, probe_logprobs)
            if group is not self._groups[-1]:
                taken = np.concatenate((taken, self._taken(found, going, len(taken))), axis=1)
            beams = group.advance(part.lanes, found, self._obeyed.lanes(part.lanes))
            self._parents[part.lanes, own] = columns(part.origins, beams)
        self._collect()

    def _apart_from(self, taken: Int64Array, choices: Choices) -> Choices:
        """The choices after the penalty for tokens that earlier groups have taken; [lanes, n]."""
        if not taken.shape[1]:
            return choices
        penalties = np.array(
            [self._plans[lane].options.diversity_penalty for lane in choices.lanes], np.float32
        )
        same = choices.tokens[..., None] == taken[:, None, None, :]
        lowered = choices.logprobs - penalties[:, None, None] * same.sum(axis=3, dtype=np.float32)
        return dataclasses.replace(choices, logprobs=lowered)

    def _taken(self, found: Continuations, going: Int64Array, lanes: int) -> Int64Array:
        """The tokens that a group takes to go on with, [lanes, beams]; -1 for none.

        At the length limit, where nothing goes on, those that it would have taken.
        """
        tokens = newest_tokens(found.hypotheses)
        chosen = np.argsort(self._is_end(tokens), axis=1, kind="stable")
        taken = np.full((lanes, self._groups[0].beams), -1, np.int64)
        taken[going] = columns(tokens, chosen[:, : taken.shape[1]])
        return taken

    def _continuations(
        self, group: BeamGroup, choices: Choices, probe_logprobs: Float32Array
    ) -> Continuations:
        """The best continuations over all beams of a group."""
        totals = choices.logprobs + group.running.scores[choices.lanes][:, :, None]
        flat = totals.reshape(len(totals), -1)
        chosen = best(flat, self._per_group())
        beams = chosen // choices.logprobs.shape[2]
        return Continuations(
            extended(
                group.running.pick_of(choices.lanes, beams),
                scores=columns(flat, chosen),
                tokens=columns(choices.tokens.reshape(flat.shape), chosen),
                logprobs=columns(choices.logprobs.reshape(flat.shape), chosen),
                origins=columns(choices.origins, beams),
                ends=self._end_ids,
                longest=self._limits[choices.lanes],
            ),
            beams,
        )

    def _collect(self) -> None:
        """Put the groups' running beams side by side, as the rows to run."""
        rows = self._groups[0].running
        for group in self._groups[1:]:
            rows = rows.beside(group.running)
        self._running = rows


def extended(
    continued: Hypotheses,
    *,
    scores: Float32Array,
    tokens: Int64Array,
    logprobs: Float32Array,
    origins: Int64Array,
    ends: Int64Array,
    longest: Int64Array,
) -> Hypotheses:
    """Beams with one more token.

    Args:
        continued: [lanes, continuations], the beam that each continues; changed.
        scores: [lanes, continuations], the new sums.
        tokens: the new tokens, likewise.
        logprobs: their log-probabilities, likewise.
        origins: the decoder's rows that chose them, likewise.
        ends: tokens that end a caption.
        longest: [lanes], tokens allowed.
    """
    lanes, rows = tokens.shape
    cells = np.arange(lanes)[:, None], np.arange(rows), continued.lengths
    continued.tokens[cells] = tokens
    continued.logprobs[cells] = logprobs
    continued.origins[cells] = origins
    continued.scores = scores
    continued.lengths += 1
    continued.ended = is_one_of(tokens, ends) | (continued.lengths >= longest[:, None])
    return continued


def newest_tokens(hypotheses: Hypotheses) -> Int64Array:
    """The last token of each row, [lanes, rows]."""
    last = hypotheses.lengths[:, :, None] - 1
    newest: Int64Array = np.take_along_axis(hypotheses.tokens, last, axis=2)[:, :, 0]
    return newest


def _part(choices: Choices, going: Int64Array, rows: slice) -> Choices:
    """The choices of some lanes and rows."""
    return Choices(
        choices.lanes[going],
        choices.logprobs[going, rows],
        choices.tokens[going, rows],
        choices.origins[going, rows],
    )
