"""What all decoding methods have in common: lanes of captions that step together.

A search decodes several captions by one method with the same number of rows. It does no I/O: the
scheduler asks for its rows, runs them with everybody else's, and hands the answer back:

    search = search.joined(plan)       one request more, as the last lane
    step = search.step()               the rows to run next, for all lanes
    search = step.advance(answer)      after what the model said about them
    search.finished                    which lanes are complete
    search.captions(lane)              a lane's result, best first
    search = search.kept(staying)      without the lanes that leave

A search is never changed: each of these gives a new one, so that a step that fails can be tried
again with each lane alone. Arrays that a search holds are read by its successors too; whoever
changes some of an array copies it first.

A lane begins with one row, which takes in the start token and the prefix; its rows part at the
first candidates.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np

from captionserve_server.core.captions import (
    CaptionPlan,
    DecodedCaption,
    FinishReason,
    SpecialTokens,
)
from captionserve_server.core.history import LIKELIEST, CaptionHistory, HistoryStep, path_of
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.hypotheses import Hypotheses, is_one_of
from captionserve_server.core.search.lanes import LaneRecord
from captionserve_server.core.search.logits_processors import (
    LOGITS_PROCESSORS,
    RowHistories,
    joined,
)
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int64Array,
    RowRequests,
    ScoreEdits,
    StepAnswer,
    no_indices,
)

_AnySearch = TypeVar("_AnySearch", bound="Search")


@dataclass(frozen=True)
class Vocabulary:
    """What a search knows of the checkpoint.

    Attributes:
        special: start and end tokens.
        size: tokens there are.
    """

    special: SpecialTokens
    size: int

    @cached_property
    def end_ids(self) -> Int64Array:
        """The tokens that end a caption."""
        return np.array(self.special.end, np.int64)


@dataclass(frozen=True)
class Lanes(LaneRecord):
    """All that a search knows of its lanes.

    Attributes:
        plans: [lanes].
        processors: bool [lanes, logits processors], which of LOGITS_PROCESSORS apply.
        wants_attention: bool [lanes].
        wants_history: bool [lanes].
        length_penalty: float64 [lanes].
        given: int64 [lanes], tokens before the first generated one.
        longest: int64 [lanes], tokens allowed, the given ones included.
        seen: int64 [lanes], tokens that the decoder has taken in.
        parents: int64 [lanes, rows], the row of the decoder's last step that each row continues.
        running: the rows, [lanes, rows].
        attention: [lanes], of each step that gave the lane a token, float32 [rows, image tokens].
        history: [lanes], of each step that gave the lane a token.
    """

    plans: tuple[CaptionPlan, ...]
    processors: BoolArray
    wants_attention: BoolArray
    wants_history: BoolArray
    length_penalty: Float64Array
    given: Int64Array
    longest: Int64Array
    seen: Int64Array
    parents: Int64Array
    running: Hypotheses
    attention: tuple[tuple[Float32Array, ...], ...]
    history: tuple[tuple[HistoryStep, ...], ...]


@dataclass(frozen=True)
class Probes:
    """The log-probabilities that were wanted in any case; every array is [probes].

    Attributes:
        lanes: whose they are.
        rows: which of the lane's rows.
        tokens: what may follow it.
        logprobs: float32.
    """

    lanes: Int64Array
    rows: Int64Array
    tokens: Int64Array
    logprobs: Float32Array

    def of_lane(self, lane: int) -> Probes:
        """Those of one lane."""
        own = self.lanes == lane
        return Probes(*(array[own] for array in vars(self).values()))


@dataclass(frozen=True)
class Choices:
    """What may follow each row of the lanes that take a token now.

    Attributes:
        lanes: [taking], which lanes.
        logprobs: float32 [taking, rows, candidates], descending; -inf for rows that did not run.
        tokens: int64, likewise.
        origins: int64 [taking, rows], the row of the decoder that each row was.
        probes: the log-probabilities that were wanted in any case.
    """

    lanes: Int64Array
    logprobs: Float32Array
    tokens: Int64Array
    origins: Int64Array
    probes: Probes


@dataclass(frozen=True)
class SearchStep:
    """What a search wants of one step of the decoder.

    Attributes:
        row_counts: [lanes], rows of each lane.
        rows: what is wanted of each row, lane by lane.
        search: the search that asks.
        ran: bool [lanes, rows], which of the lanes' rows these are.
        takes: bool [lanes], whether the step gives the lane a token; else it reads the prefix.
    """

    row_counts: Int64Array
    rows: RowRequests
    search: Search
    ran: BoolArray
    takes: BoolArray

    def advance(self, answer: StepAnswer) -> Search:
        """The search after the step; the one before stays as it was."""
        lanes = self.search.lanes
        lanes = lanes.with_fields(seen=lanes.seen + 1, attention=self._attention(answer.attention))
        search = dataclasses.replace(self.search, lanes=lanes)
        return search._extended(self._choices(answer)) if self.takes.any() else search

    def _attention(self, attention: Float32Array) -> tuple[tuple[Float32Array, ...], ...]:
        """The lanes' attention with the step's, [attended, image tokens]."""
        kept = self.search.lanes.attention
        if not len(attention):
            return kept
        longer = list(kept)
        begin = 0
        for lane in np.flatnonzero(self.takes & self.search.lanes.wants_attention):
            end = begin + int(self.row_counts[lane])
            longer[lane] = (*kept[lane], attention[begin:end])
            begin = end
        return tuple(longer)

    def _choices(self, answer: StepAnswer) -> Choices:
        lanes = np.flatnonzero(self.takes)
        ran = self.ran[lanes]
        per_row = int(self.rows.candidate_counts.max())
        logprobs = answer.logprobs.reshape(-1, per_row)
        tokens = answer.tokens.reshape(-1, per_row)
        if ran.all():
            shape = (*ran.shape, per_row)
            logprobs, tokens = logprobs.reshape(shape), tokens.reshape(shape)
            origins = np.broadcast_to(np.arange(ran.shape[1]), ran.shape)
        else:
            # Which of the rows with candidates each row of a lane is, and which of the lane's own.
            answers = np.cumsum(ran).reshape(ran.shape) - 1
            origins = np.maximum(np.cumsum(ran, axis=1) - 1, 0)
            logprobs, tokens = logprobs[answers], tokens[answers]
            # Before a lane's rows part they all stand where its first row stands.
            before = self.search.lanes
            single = (before.seen < before.given)[lanes, None]
            logprobs[~(ran | single)] = -np.inf
        of_lane, of_row = (index[self.rows.probe_rows] for index in self.ran.nonzero())
        probes = Probes(of_lane, of_row, self.rows.probe_tokens, answer.probe_logprobs)
        return Choices(lanes, logprobs, tokens, origins, probes)


@dataclass(frozen=True)
class Search(ABC):
    """Lanes of captions decoded by one method; subclasses say how rows are extended.

    Attributes:
        vocabulary: the checkpoint's tokens.
        rows: rows of each lane.
        lanes: all there is to know of them.
    """

    vocabulary: Vocabulary
    rows: int
    lanes: Lanes

    normalises_first: ClassVar[bool] = False
    """Whether scores are log-probabilities before the logits processors see them."""

    @classmethod
    def without_lanes(
        cls: type[_AnySearch], vocabulary: Vocabulary, options: DecodingOptions
    ) -> _AnySearch:
        """A search for captions of the options' kind, none of which is there yet."""
        lane = cls.new_lane(vocabulary, CaptionPlan(options))
        return cls(vocabulary, options.rows, lane.kept(np.zeros(1, np.bool_)))

    def __len__(self) -> int:
        """Lanes there are."""
        return len(self.lanes.plans)

    def joined(self: _AnySearch, plan: CaptionPlan) -> _AnySearch:
        """The search with one request more, as the last lane."""
        lane = self.new_lane(self.vocabulary, plan)
        return dataclasses.replace(self, lanes=self.lanes.followed_by(lane))

    def kept(self: _AnySearch, staying: BoolArray) -> _AnySearch:
        """The search with only the lanes that stay, [lanes]."""
        return dataclasses.replace(self, lanes=self.lanes.kept(staying))

    def step(self) -> SearchStep:
        """The next step of all lanes."""
        lanes, running = self.lanes, self.lanes.running
        parted = lanes.seen >= lanes.given
        ran = np.where(parted[:, None], self._live_rows(), np.arange(self.rows) == 0)
        row_counts = ran.sum(axis=1)
        takes = (lanes.seen >= lanes.given - 1) & (row_counts > 0)
        of_lane, of_row = np.nonzero(ran)
        row_takes = takes[of_lane]
        edits, probe_rows, probe_tokens = self._wanted(of_lane, of_row, row_takes)
        rows = RowRequests(
            tokens=running.tokens[of_lane, of_row, lanes.seen[of_lane]],
            parents=lanes.parents[of_lane, of_row],
            candidate_counts=np.where(row_takes, self._candidates_asked_for(), 0),
            normalise_first=np.full(len(of_lane), self.normalises_first),
            edits=edits,
            probe_rows=probe_rows,
            probe_tokens=probe_tokens,
            attention_rows=np.flatnonzero(lanes.wants_attention[of_lane] & row_takes),
        )
        return SearchStep(row_counts, rows, self, ran, takes)

    @property
    @abstractmethod
    def finished(self) -> BoolArray:
        """[lanes], whether no further step is wanted."""

    @abstractmethod
    def captions(self, lane: int) -> list[DecodedCaption]:
        """The captions asked for, best first; of a lane that is finished."""

    @abstractmethod
    def best_so_far(self, lane: int) -> list[DecodedCaption]:
        """The best captions there are now, at the deadline; empty before the first token."""

    @abstractmethod
    def certain_tokens(self, lane: int) -> tuple[int, ...]:
        """The generated tokens with which the best caption will begin, whatever comes."""

    @classmethod
    def new_lane(cls, vocabulary: Vocabulary, plan: CaptionPlan) -> Lanes:
        """One lane before its first step."""
        given = (vocabulary.special.start, *plan.words.prefix)
        options = plan.options
        running = Hypotheses.none(1, options.rows, options.max_length)
        running.tokens[0, :, : len(given)] = given
        running.lengths[0] = len(given)
        return Lanes(
            plans=(plan,),
            processors=np.array([[each.applies(plan) for each in LOGITS_PROCESSORS]], np.bool_),
            wants_attention=np.array([options.output_attentions], np.bool_),
            wants_history=np.array([options.output_beams], np.bool_),
            length_penalty=np.array([options.length_penalty], np.float64),
            given=np.array([len(given)], np.int64),
            longest=np.array([options.max_length], np.int64),
            seen=np.zeros(1, np.int64),
            parents=np.zeros((1, options.rows), np.int64),
            running=running,
            attention=((),),
            history=((),),
        )

    @abstractmethod
    def _live_rows(self) -> BoolArray:
        """[lanes, rows], the rows that go on."""

    @abstractmethod
    def _candidates_per_row(self) -> int:
        """Candidates wanted of each row."""

    def _candidates_asked_for(self) -> int:
        """Candidates asked for of each row: also those that are only told."""
        needed = self._candidates_per_row()
        if not self.lanes.wants_history.any():
            return needed
        return max(needed, min(LIKELIEST, self.vocabulary.size))

    @abstractmethod
    def _extended(self, choices: Choices) -> Search:
        """The search with one token more in the lanes that take one; the step has been seen."""

    def _wanted(
        self, of_lane: Int64Array, of_row: Int64Array, takes: BoolArray
    ) -> tuple[ScoreEdits, Int64Array, Int64Array]:
        """The rows' edits, and rows and tokens whose log-probability is wanted in any case.

        Args:
            of_lane: [rows to run], the lane of each.
            of_row: [rows to run], which of the lane's rows it is.
            takes: bool [rows to run], whether it has candidates.
        """
        applying = np.flatnonzero(self.lanes.processors.any(axis=0))
        if not len(applying):
            return ScoreEdits(), no_indices(), no_indices()
        running = self.lanes.running
        histories = RowHistories(
            plans=self.lanes.plans,
            caption=of_lane,
            tokens=running.tokens[of_lane, of_row],
            lengths=running.lengths[of_lane, of_row],
            special=self.vocabulary.special,
        )
        edits = joined([LOGITS_PROCESSORS[at].edits(histories) for at in applying])
        return edits, no_indices(), no_indices()

    def _caption(self, hypotheses: Hypotheses, lane: int, row: int, score: float) -> DecodedCaption:
        """A row as a caption."""
        lanes = self.lanes
        length = int(hypotheses.lengths[lane, row])
        generated = slice(int(lanes.given[lane]), length)
        tokens = hypotheses.tokens[lane, row, generated]
        reason: FinishReason = "length" if length >= lanes.longest[lane] else "deadline"
        if is_one_of(tokens[-1:], self.vocabulary.end_ids).any():
            reason = "eos"
        attention: Float32Array | None = None
        if lanes.wants_attention[lane]:
            origins = hypotheses.origins[lane, row, generated].tolist()
            steps = zip(lanes.attention[lane], origins, strict=False)
            attention = np.stack([rows[origin] for rows, origin in steps])
        history: CaptionHistory | None = None
        if lanes.wants_history[lane]:
            chosen_by = hypotheses.origins[lane, row, generated].tolist()
            path = path_of(lanes.history[lane], row, tokens.tolist(), chosen_by)
            history = CaptionHistory(lanes.history[lane], path)
        return DecodedCaption(
            token_ids=tuple(tokens.tolist()),
            token_logprobs=tuple(hypotheses.logprobs[lane, row, generated].tolist()),
            score=score,
            finish_reason=reason,
            attention=attention,
            history=history,
        )
