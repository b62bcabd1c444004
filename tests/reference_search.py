"""Diverse and constrained beam search by their definitions, written to be read and not to be fast.

transformers 5 has neither. Its beam search is the model for what every beam search has in common:
which continuations may complete a caption, which go on, and when the search stops.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from captionserve_server.core.options import EarlyStopping
from numpy.typing import NDArray

Tokens = tuple[int, ...]
Row = NDArray[np.float32]
"""[V], a log-probability for each token."""
Logprobs = Callable[[list[Tokens]], list[Row]]
"""Whole sequences of one length, what was given included, to the row of each one's next token."""


@dataclass(frozen=True)
class Rules:
    """What a beam search obeys.

    Attributes:
        given: the tokens before the first generated one.
        end: tokens that end a caption.
        beams: beams of the search, or of each of its groups.
        longest: most tokens generated.
        length_penalty: exponent of the length that divides the summed log-probability.
        early_stopping: False, True or "never".
    """

    given: Tokens
    end: frozenset[int]
    beams: int
    longest: int
    length_penalty: float
    early_stopping: EarlyStopping

    @property
    def kept(self) -> int:
        """Continuations looked at: enough for all beams to go on when every one may end."""
        return max(2, 1 + len(self.end)) * self.beams

    def score(self, total: float, length: int) -> float:
        """A summed log-probability under the length penalty."""
        return float(total / length**self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A caption in the making.

    Attributes:
        tokens: those generated.
        logprobs: of each of them.
        total: their sum.
    """

    tokens: Tokens = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0

    def followed_by(self, token: int, logprob: float) -> Hypothesis:
        """The hypothesis with one token more."""
        total = float(np.float32(self.total) + np.float32(logprob))
        return Hypothesis((*self.tokens, token), (*self.logprobs, logprob), total)

    def has_ended(self, rules: Rules) -> bool:
        """Whether its newest token ends it, or nothing may follow."""
        return self.tokens[-1] in rules.end or len(self.tokens) == rules.longest


@dataclass(frozen=True)
class Completed:
    """A caption.

    Attributes:
        hypothesis: what was generated.
        score: its sum under the length penalty.
    """

    hypothesis: Hypothesis
    score: float


class Beams:
    """What one beam search has at a time.

    Attributes:
        running: the hypotheses that go on; before the first token a single one.
        completed: the best captions so far, best first, at most as many as beams.
        stopped: whether the search is over.
    """

    def __init__(self, rules: Rules) -> None:
        """Begin before the first token."""
        self._rules = rules
        self.running = [Hypothesis()]
        self.completed: list[Completed] = []
        self.stopped = False

    def take(self, competing: Iterable[Hypothesis], going_on: list[Hypothesis]) -> None:
        """Finish a step.

        Args:
            competing: hypotheses that have ended and may enter the completed captions.
            going_on: hypotheses of the next step.
        """
        rules = self._rules
        scored = [Completed(each, rules.score(each.total, len(each.tokens))) for each in competing]
        self.completed = best_completed([*self.completed, *scored])[: rules.beams]
        self.running = going_on
        self.stopped = not going_on or (self._is_full() and not self._wants_more())

    def _is_full(self) -> bool:
        return len(self.completed) == self._rules.beams

    def _wants_more(self) -> bool:
        rules = self._rules
        if rules.early_stopping is True:
            return False
        hopes_for_longest = rules.early_stopping == "never" and rules.length_penalty > 0
        length = rules.longest if hopes_for_longest else len(self.running[0].tokens)
        hoped = rules.score(max(each.total for each in self.running), length)
        return hoped > self.completed[-1].score


def best_completed(captions: Iterable[Completed]) -> list[Completed]:
    """Captions by score, best first; the earlier one first among equals."""
    return sorted(captions, key=lambda caption: -caption.score)


# A beam and the token that follows it.
_Cell = tuple[int, int]


def _best_cells(running: Sequence[Hypothesis], rows: Sequence[Row], count: int) -> list[_Cell]:
    """The best continuations over all beams, best first; ties: lower beam, then lower token."""
    totals = [
        (row + np.float32(beam.total)).tolist() for beam, row in zip(running, rows, strict=True)
    ]
    ordered = heapq.nsmallest(
        count,
        (
            (-total, beam, token)
            for beam, of_beam in enumerate(totals)
            for token, total in enumerate(of_beam)
        ),
    )
    return [(beam, token) for _, beam, token in ordered]


def _hypotheses(
    running: Sequence[Hypothesis], rows: Sequence[Row], cells: Iterable[_Cell]
) -> list[Hypothesis]:
    """What becomes of beams by taking a token."""
    return [running[beam].followed_by(token, float(rows[beam][token])) for beam, token in cells]


def diverse_beam_search(
    logprobs: Logprobs, rules: Rules, *, groups: int, diversity_penalty: float
) -> list[Completed]:
    """Diverse beam search (Vijayakumar et al. 2016): groups that avoid each other's tokens.

    Args:
        logprobs: the model.
        rules: of each group.
        groups: groups of rules.beams beams.
        diversity_penalty: taken off a token's log-probability for each beam of an earlier group
            that has just taken it; at the length limit too, where no beam goes on.

    Returns:
        The completed captions of all groups, best first; the earlier group first among equals.
    """
    all_beams = [Beams(rules) for _ in range(groups)]
    while running := [beams for beams in all_beams if not beams.stopped]:
        rows = logprobs([rules.given + each.tokens for beams in running for each in beams.running])
        taken: Counter[int] = Counter()
        for beams in running:
            own, rows = rows[: len(beams.running)], rows[len(beams.running) :]
            lowered = [_penalised(row, taken, diversity_penalty) for row in own]
            taken.update(_take_best(beams, lowered, rules))
    return best_completed(caption for beams in all_beams for caption in beams.completed)


def _penalised(row: Row, taken: Counter[int], penalty: float) -> Row:
    """A row after the penalty for the tokens that earlier groups have taken."""
    lowered = row.copy()
    for token, times in taken.items():
        lowered[token] -= np.float32(penalty) * np.float32(times)
    return lowered


def _take_best(beams: Beams, rows: Sequence[Row], rules: Rules) -> list[int]:
    """A step of plain beam search.

    Returns:
        The tokens with which the beams go on, or would if the length limit let them.
    """
    cells = _best_cells(beams.running, rows, rules.kept)
    candidates = _hypotheses(beams.running, rows, cells)
    going_on = [each for each in candidates if not each.has_ended(rules)]
    beams.take(
        [each for each in candidates[: rules.beams] if each.has_ended(rules)],
        going_on[: rules.beams],
    )
    open_ended = [each for each in candidates if each.tokens[-1] not in rules.end]
    return [each.tokens[-1] for each in open_ended[: rules.beams]]


@dataclass(frozen=True)
class Constraint:
    """A word or phrase that a caption must contain, in one of two variants.

    Attributes:
        spaced: the tokens that may stand anywhere.
        initial: the tokens that may stand at the very beginning only; None where they never can.
    """

    spaced: Tokens
    initial: Tokens | None

    @property
    def length(self) -> int:
        """Tokens of the longer variant."""
        return max(len(self.spaced), len(self.initial or ()))

    def is_met(self, generated: Tokens) -> bool:
        """Whether a variant is there."""
        if self.initial is not None and generated[: len(self.initial)] == self.initial:
            return True
        size = len(self.spaced)
        return any(
            generated[begin : begin + size] == self.spaced for begin in range(len(generated))
        )

    def progress(self, generated: Tokens) -> int:
        """How many tokens of a variant stand at the end, the variant's last one never among them.

        Only for constraints that are not met.
        """
        begun = self._begun(generated)
        return max(self._spaced_progress(generated), len(generated) if begun else 0)

    def advancing(self, generated: Tokens) -> set[int]:
        """The tokens that carry a variant on; only for constraints that are not met."""
        tokens = {self.spaced[self._spaced_progress(generated)]}
        if self.initial is not None and self._begun(generated):
            tokens.add(self.initial[len(generated)])
        return tokens

    def _spaced_progress(self, generated: Tokens) -> int:
        lengths = range(min(len(self.spaced) - 1, len(generated)), 0, -1)
        return next((n for n in lengths if generated[-n:] == self.spaced[:n]), 0)

    def _begun(self, generated: Tokens) -> bool:
        """Whether all that was generated is a part of the initial variant."""
        initial = self.initial
        if initial is None or len(generated) >= len(initial):
            return False
        return generated == initial[: len(generated)]


def constrained_beam_search(
    logprobs: Logprobs, rules: Rules, constraints: Sequence[Constraint]
) -> list[Completed]:
    """Constrained beam search with dynamic beam allocation (Post & Vilar 2018).

    Args:
        logprobs: the model.
        rules: of the search.
        constraints: what every caption contains.

    Returns:
        The completed captions, best first; none where no caption could meet the constraints.
    """
    beams = Beams(rules)
    while not beams.stopped:
        rows = [
            _without_end(row, rules) if _unmet(constraints, each.tokens) else row
            for each, row in zip(
                beams.running,
                logprobs([rules.given + each.tokens for each in beams.running]),
                strict=True,
            )
        ]
        candidates = _constrained_candidates(beams.running, rows, rules, constraints)
        complete = [each for each in candidates if not _unmet(constraints, each.tokens)]
        beams.take(
            [each for each in complete[: rules.beams] if each.has_ended(rules)],
            _allocated(
                [each for each in candidates if not each.has_ended(rules)], rules, constraints
            ),
        )
    return beams.completed


def _unmet(constraints: Sequence[Constraint], generated: Tokens) -> list[Constraint]:
    return [each for each in constraints if not each.is_met(generated)]


def _without_end(row: Row, rules: Rules) -> Row:
    """A row in which no token ends the caption."""
    open_row = row.copy()
    open_row[sorted(rules.end)] = -np.inf
    return open_row


def _constrained_candidates(
    running: Sequence[Hypothesis],
    rows: Sequence[Row],
    rules: Rules,
    constraints: Sequence[Constraint],
) -> list[Hypothesis]:
    """The best over all beams, what advances a constraint, and each beam's best; best first."""
    likely = set(_best_cells(running, rows, rules.kept))
    advancing = {
        (beam, token)
        for beam, each in enumerate(running)
        for constraint in _unmet(constraints, each.tokens)
        for token in constraint.advancing(each.tokens)
    }
    each_best = {(beam, int(row.argmax())) for beam, row in enumerate(rows)}
    # In the order of beams and tokens, which a stable sort keeps among equals.
    cells = sorted(likely | advancing | each_best)
    possible = [(beam, token) for beam, token in cells if rows[beam][token] > -np.inf]
    return sorted(_hypotheses(running, rows, possible), key=lambda each: -each.total)


def _allocated(
    candidates: Sequence[Hypothesis], rules: Rules, constraints: Sequence[Constraint]
) -> list[Hypothesis]:
    """The best of each bank in turn, the fullest bank first, until there are enough."""
    banks: dict[int, list[Hypothesis]] = {}
    for each in candidates:
        banks.setdefault(_bank(constraints, each.tokens), []).append(each)
    rounds = max((len(members) for members in banks.values()), default=0)
    in_turn = [
        banks[bank][rank]
        for rank in range(rounds)
        for bank in sorted(banks, reverse=True)
        if rank < len(banks[bank])
    ]
    return in_turn[: rules.beams]


def _bank(constraints: Sequence[Constraint], generated: Tokens) -> int:
    """Tokens of the constraints that are met, and of the one that has come farthest."""
    met = sum(each.length for each in constraints if each.is_met(generated))
    unmet = _unmet(constraints, generated)
    return met + max((each.progress(generated) for each in unmet), default=0)
