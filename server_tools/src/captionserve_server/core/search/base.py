"""What all decoding methods have in common: lanes of captions that step together.

A search decodes several captions by one method with the same number of rows. It is a state machine
without I/O: the engine asks for its rows, runs them with everybody else's, and hands the answer
back:

    search.join(plan)          a caption enters, as the last lane
    search.ask()               the rows to run next, for all lanes
    search.advance(answer)     what the model said about them
    search.finished            which lanes are complete
    search.captions(lane)      a lane's result, best first
    search.leave(staying)      the other lanes go

A lane begins with one row, which takes in the start token and the prefix; its rows part at the
first candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.captions import (
    CaptionPlan,
    DecodedCaption,
    FinishReason,
    SpecialTokens,
)
from captionserve_server.core.search.hypotheses import Hypotheses
from captionserve_server.core.search.logits_processors import (
    FILTERS,
    FilterRows,
    LogitFilter,
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


@dataclass(frozen=True)
class Vocabulary:
    """What a search knows of the checkpoint.

    Attributes:
        special: start and end tokens.
        size: tokens there are.
    """

    special: SpecialTokens
    size: int


@dataclass(frozen=True)
class Asked:
    """What a search wants of the next step.

    Attributes:
        row_counts: [lanes].
        rows: what is wanted of each row, lane by lane.
    """

    row_counts: Int64Array
    rows: RowRequests


@dataclass(frozen=True)
class Choices:
    """What may follow each row of the lanes that take a token now.

    Attributes:
        lanes: [taking], which lanes.
        logprobs: float32 [taking, rows, candidates], descending; -inf for rows that did not run.
        tokens: int64, likewise.
        origins: int64 [taking, rows], the row of the decoder that each row was.
    """

    lanes: Int64Array
    logprobs: Float32Array
    tokens: Int64Array
    origins: Int64Array


class Search(ABC):
    """Lanes of captions decoded by one method; subclasses say how rows are extended."""

    normalises_first = False
    """Whether scores are log-probabilities before the filters see them."""

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        """Begin without lanes; each will have `rows` rows."""
        self._vocabulary = vocabulary
        self._rows = rows
        self._end_ids = np.array(vocabulary.special.end, np.int64)
        self._plans: list[CaptionPlan] = []
        self._running = Hypotheses.placeholders(0, rows, 0)
        # Per lane: tokens that were given, tokens allowed, tokens that the decoder has seen.
        self._given = no_indices()
        self._limits = no_indices()
        self._seen = no_indices()
        # [lanes, rows], the row of the decoder's last step that each running row continues.
        self._parents = np.zeros((0, rows), np.int64)
        self._attention: list[list[Float32Array]] = []
        self._ran = np.zeros((0, rows), np.bool_)
        self._filters: list[LogitFilter] = []
        self._wants_attention = np.zeros(0, np.bool_)

    def __len__(self) -> int:
        """Lanes there are."""
        return len(self._plans)

    def join(self, plan: CaptionPlan) -> None:
        """Take a caption in, as the last lane."""
        given = (self._vocabulary.special.start, *plan.words.prefix)
        limit = plan.options.max_length
        lane = Hypotheses.placeholders(1, self._rows, limit)
        lane.tokens[0, :, : len(given)] = given
        lane.lengths[0] = len(given)
        lane.scores[0, 0] = 0.0
        self._running = self._running.followed_by(lane)
        self._plans.append(plan)
        self._given = np.append(self._given, len(given))
        self._limits = np.append(self._limits, limit)
        self._seen = np.append(self._seen, 0)
        self._parents = np.append(self._parents, np.zeros((1, self._rows), np.int64), axis=0)
        self._attention.append([])
        self._note_options()

    def leave(self, staying: BoolArray) -> None:
        """Keep the lanes that stay, [lanes]."""
        self._plans = [plan for plan, stays in zip(self._plans, staying, strict=True) if stays]
        self._attention = [
            steps for steps, stays in zip(self._attention, staying, strict=True) if stays
        ]
        self._running = self._running.lanes(staying)
        self._given = self._given[staying]
        self._limits = self._limits[staying]
        self._seen = self._seen[staying]
        self._parents = self._parents[staying]
        self._note_options()

    def ask(self) -> Asked:
        """The rows to run next."""
        parted = self._seen >= self._given
        self._ran = np.where(parted[:, None], self._live_rows(), np.arange(self._rows) == 0)
        lanes, rows = np.nonzero(self._ran)
        takes = self._takes_token()[lanes]
        probe_rows, probe_tokens = self._probes(lanes, rows)
        requests = RowRequests(
            tokens=self._running.tokens[lanes, rows, self._seen[lanes]],
            parents=self._parents[lanes, rows],
            candidate_counts=np.where(takes, self._candidates_per_row(), 0),
            normalise_first=np.full(len(lanes), self.normalises_first),
            edits=self._edits(lanes, rows),
            probe_rows=probe_rows,
            probe_tokens=probe_tokens,
            attention_rows=np.flatnonzero(self._wants_attention[lanes] & takes),
        )
        return Asked(self._ran.sum(axis=1), requests)

    def advance(self, answer: StepAnswer) -> None:
        """Take one step's answer in; its rows are those of the last `ask`."""
        self._keep_attention(answer.attention)
        taking = self._takes_token()
        self._seen += 1
        if taking.any():
            self._extend(self._choices(taking, answer), answer.probe_logprobs)

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

    @abstractmethod
    def _candidates_per_row(self) -> int:
        """Candidates wanted of each row."""

    @abstractmethod
    def _extend(self, choices: Choices, probe_logprobs: Float32Array) -> None:
        """Give the lanes that take a token their next one."""

    def _note_options(self) -> None:
        """Look through the lanes' options once for all their steps."""
        self._wants_attention = np.array(
            [plan.options.output_attentions for plan in self._plans], np.bool_
        )
        self._filters = [
            logit_filter
            for logit_filter in FILTERS
            if any(logit_filter.applies(plan) for plan in self._plans)
        ]

    def _live_rows(self) -> BoolArray:
        """[lanes, rows], the rows that go on."""
        return np.ones((len(self), self._rows), np.bool_)

    def _probes(self, lanes: Int64Array, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Indices of the rows to run, and tokens, whose log-probability is wanted in any case."""
        return no_indices(), no_indices()

    def _edits(self, lanes: Int64Array, rows: Int64Array) -> ScoreEdits:
        """Scores to change for the rows to run."""
        if not self._filters:
            return ScoreEdits()
        context = FilterRows(
            plans=self._plans,
            caption=lanes,
            tokens=self._running.tokens[lanes, rows],
            lengths=self._running.lengths[lanes, rows],
            special=self._vocabulary.special,
        )
        return joined([logit_filter.edits(context) for logit_filter in self._filters])

    def _takes_token(self) -> BoolArray:
        """[lanes], whether the step gives the lane a token; else the prefix is still read."""
        return self._seen >= self._given - 1

    def _choices(self, taking: BoolArray, answer: StepAnswer) -> Choices:
        lanes = np.flatnonzero(taking)
        ran = self._ran[lanes]
        per_row = self._candidates_per_row()
        # Which of the answer's rows each row of a lane is, and which of the lane's own.
        answers = np.cumsum(ran).reshape(ran.shape) - 1
        origins = np.maximum(np.cumsum(ran, axis=1) - 1, 0)
        single = (self._seen[lanes] == self._given[lanes])[:, None]
        logprobs = answer.logprobs.reshape(-1, per_row)[answers]
        tokens = answer.tokens.reshape(-1, per_row)[answers]
        # Before a lane's rows part they all stand where its first row stands.
        logprobs[~(ran | single)] = -np.inf
        return Choices(lanes, logprobs, tokens, origins)

    def _keep_attention(self, attention: Float32Array) -> None:
        counts = self._ran.sum(axis=1)
        begin = 0
        for lane in np.flatnonzero(self._takes_token() & self._wants_attention):
            self._attention[lane].append(attention[begin : begin + counts[lane]])
            begin += int(counts[lane])

    def _is_end(self, tokens: Int64Array) -> BoolArray:
        return is_one_of(tokens, self._end_ids)

    def _caption(self, hypotheses: Hypotheses, lane: int, row: int, score: float) -> DecodedCaption:
        """A row as a caption."""
        generated = slice(int(self._given[lane]), int(hypotheses.lengths[lane, row]))
        tokens = hypotheses.tokens[lane, row, generated]
        return DecodedCaption(
            token_ids=tuple(tokens.tolist()),
            token_logprobs=tuple(hypotheses.logprobs[lane, row, generated].tolist()),
            score=score,
            finish_reason=self._finish_reason(lane, int(hypotheses.lengths[lane, row]), tokens),
            attention=self._attention_of(lane, hypotheses.origins[lane, row, generated]),
        )

    def _finish_reason(self, lane: int, length: int, tokens: Int64Array) -> FinishReason:
        if self._is_end(tokens[-1:]).any():
            return "eos"
        return "length" if length >= self._limits[lane] else "deadline"

    def _attention_of(self, lane: int, origins: Int64Array) -> Float32Array | None:
        if not self._plans[lane].options.output_attentions:
            return None
        steps = self._attention[lane]
        looked: Float32Array = np.stack([steps[step][row] for step, row in enumerate(origins)])
        return looked


def is_one_of(tokens: Int64Array, few: Int64Array) -> BoolArray:
    """Whether each token is among `few`; np.isin takes ten times as long for so little."""
    among: BoolArray = (tokens[..., None] == few).any(axis=-1)
    return among


def shared_beginning(rows: Int64Array, lengths: Int64Array) -> tuple[int, ...]:
    """The tokens with which all rows begin; [rows, longest] and [rows]."""
    if not len(rows):
        return ()
    shortest = int(lengths.min())
    same = (rows[:, :shortest] == rows[0, :shortest]).all(axis=0)
    shared = shortest if same.all() else int(np.argmin(same))
    return tuple(rows[0, :shared].tolist())


def length_penalised(
    scores: Float32Array, lengths: Int64Array, exponents: Float64Array
) -> Float32Array:
    """Sums of log-probabilities, each divided by its length ** exponent; any equal shapes."""
    divisors = (lengths.astype(np.float64) ** exponents).astype(np.float32)
    penalised: Float32Array = scores / divisors
    return penalised
