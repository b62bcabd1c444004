"""Fits confidences to captions known to be right or wrong, and measures what they are worth.

The fit is Platt's (1999, "Probabilistic outputs for support vector machines"): a logistic
regression, whose targets keep a little off 0 and 1 so that few captions, or captions that the
signals tell apart without fault, do not give a confidence without doubt. The weights of an image's
mean encoder state, of which there are hundreds, are held near 0 by a ridge penalty.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.confidence import (
    AS_IT_IS,
    SIGNALS,
    Calibration,
    Evidence,
    Logistic,
    Record,
    SpokenWord,
    caption_signals,
    word_signals,
)

NUM_BINS = 10
_MOST_NEWTON_STEPS = 100
_CONVERGED = 1e-9
# Times half the square of a weight, for numbers scaled to variance 1: that of a weight a prior.
_IMAGE_PENALTY = 1.0
# A word said once or twice says little of itself.
_FEW_WORDS = 2.0

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class CannotCalibrateError(ValueError):
    """The captions give no calibration; the message says why."""


@dataclass(frozen=True)
class JudgedCaption:
    """A caption of which it is known whether it and its words are right.

    Attributes:
        evidence: what is known of it otherwise, its groundings and image_state among that.
        right: whether it is right.
        right_words: of each of its words, whether it is right.
    """

    evidence: Evidence
    right: bool
    right_words: Sequence[bool]


@dataclass(frozen=True)
class ReliabilityBin:
    """Those whose confidence is in [lower, upper); the last bin's upper end belongs to it.

    Attributes:
        lower: lower end, 0..1.
        upper: upper end, 0..1.
        count: how many there are.
        mean_confidence: their mean confidence, 0..1; None if there are none.
        right: the share of them that is right, 0..1; None if there are none.
    """

    lower: float
    upper: float
    count: int
    mean_confidence: float | None
    right: float | None


@dataclass(frozen=True)
class Reliability:
    """How well confidences agree with what turned out right.

    Attributes:
        count: how many captions, or words, were judged.
        right: the share of them that is right, 0..1.
        mean_confidence: 0..1; above `right` where the captioner thinks too well of itself.
        expected_calibration_error: over the bins, the mean distance between mean confidence and
            share of right captions, weighted by captions; 0..1.
        brier_score: mean squared distance of the confidence from 1 for right captions and 0 for
            wrong ones; 0..1.
        auc: chance that a right caption has a higher confidence than a wrong one, ties counted
            half; None unless there are both.
        bins: ten of equal width, from confidence 0 to 1.
    """

    count: int
    right: float
    mean_confidence: float
    expected_calibration_error: float
    brier_score: float
    auc: float | None
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class FitReport:
    """What one fit of a calibration is worth on captions, or words, that it was not fitted to.

    Attributes:
        uncalibrated: of the probabilities as they are, over all kinds of captions.
        calibrated: of the fit, over all kinds of captions.
        by_kind: of the fit, on each kind of captions alone.
        signals: by kind of captions, the AUC of each signal alone; None unless there are right and
            wrong ones.
    """

    uncalibrated: Reliability
    calibrated: Reliability
    by_kind: dict[str, Reliability]
    signals: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration and what it is worth on captions that it was not fitted to.

    Attributes:
        calibration: the one fitted.
        fits: what each of its fits is worth, by name.
    """

    calibration: Calibration
    fits: dict[str, FitReport]


@dataclass(frozen=True)
class Observation:
    """What a fit is given of a caption or a word, and whether that is right."""

    signals: Mapping[str, float]
    right: bool


def calibrate(
    fitting: Sequence[JudgedCaption], measuring: Mapping[str, Sequence[JudgedCaption]]
) -> CalibrationReport:
    """Fit a calibration to some captions and measure it on others.

    Args:
        fitting: the captions to fit to.
        measuring: name of a kind of captions to captions of it; at least one of each kind.

    Raises:
        CannotCalibrateError: as `fit_calibration` does.
    """
    calibration = fit_calibration(fitting)
    return CalibrationReport(
        calibration,
        {name: _fit_report(name, calibration, measuring) for name in SIGNALS},
    )


def fit_calibration(captions: Sequence[JudgedCaption]) -> Calibration:
    """Fit a calibration to captions and their words.

    What a word's record says of a caption it was taken from would be too good, so that of each
    caption is of all the others.

    Raises:
        CannotCalibrateError: unless there are right and wrong ones, and the right ones tend to have
            likelier tokens.
    """
    tally = Tally.of(captions)
    records = [tally.record_without(Tally.of([caption])) for caption in captions]
    states = np.array([caption.evidence.image_state for caption in captions], np.float64)
    fits: dict[str, Logistic] = {}
    image: tuple[float, ...] = ()
    for name, signals in SIGNALS.items():
        observations = _observations(name, captions, records)
        if "image" in signals:
            known = [signal for signal in signals if signal != "image"]
            fits[name], image = fit_to_signals(known, observations, states)
        else:
            fits[name], _ = fit_to_signals(signals, observations)
    return Calibration(**fits, records=tally.records(), image=image)


@dataclass(frozen=True)
class Tally:
    """How often each word, in lower case, has been said, and right."""

    said: Counter[str]
    right: Counter[str]

    @classmethod
    def of(cls, captions: Sequence[JudgedCaption]) -> Tally:
        """That of captions."""
        tally = cls(Counter(), Counter())
        for caption in captions:
            for word, right in zip(caption.evidence.words, caption.right_words, strict=True):
                tally.said[word.text.lower()] += 1
                tally.right[word.text.lower()] += right
        return tally

    def records(self) -> dict[str, float]:
        """Each word's log-odds of being right; under "" those of a word that is not among them."""
        words = ("", *sorted(self.said))
        return {word: self._log_odds(self.said[word], self.right[word]) for word in words}

    def record_without(self, own: Tally) -> Record:
        """What gives words their records, without those of a caption that is among these."""

        def record(word: SpokenWord) -> float:
            text = word.text.lower()
            return self._log_odds(
                self.said[text] - own.said[text], self.right[text] - own.right[text]
            )

        return record

    def _log_odds(self, said: int, right: int) -> float:
        """The log-odds of being right, with a few words more that are right as often as all."""
        share = (self.right.total() + 1) / (self.said.total() + 2)
        wrong = said - right
        return math.log(right + _FEW_WORDS * share) - math.log(wrong + _FEW_WORDS * (1 - share))


def fit_to_signals(
    signals: Sequence[str],
    observations: Sequence[Observation],
    states: Float64Array | None = None,
) -> tuple[Logistic, tuple[float, ...]]:
    """Fit a logistic function of signals, and find the one of the image.

    Args:
        signals: which, "log_odds" among them.
        observations: what it learns from.
        states: [observations, encoder width], mean encoder state of each; None for none.

    Returns:
        the fit, in which the signal "image" has a weight of 1, and what each number of a mean state
        adds to that signal; without states there is none.

    Raises:
        CannotCalibrateError: as `fit_calibration` does.
    """
    if states is None:
        states = np.zeros((len(observations), 0))
    labels = np.array([each.right for each in observations], dtype=np.bool_)
    if labels.all() or not labels.any():
        raise CannotCalibrateError("both right and wrong captions are needed")
    columns = [[each.signals[signal] for each in observations] for signal in signals]
    # What does not vary says nothing, and leaves the fit without a single best.
    if any(np.ptp(column) == 0 for column in columns):
        raise CannotCalibrateError("all captions are equally likely")
    centre, spread = states.mean(axis=0), states.std(axis=0)
    spread[spread == 0] = 1.0
    features = np.column_stack((np.ones(len(labels)), *columns, (states - centre) / spread))
    penalties = np.repeat([0.0, _IMAGE_PENALTY], [1 + len(signals), states.shape[1]])
    weights = fit_logistic(features, _platt_targets(labels), penalties)
    image = weights[1 + len(signals) :] / spread
    by_name = dict(zip(signals, weights[1:].tolist(), strict=False))
    if by_name["log_odds"] <= 0:
        raise CannotCalibrateError("captions of likelier tokens are not more often right")
    if len(image):
        by_name["image"] = 1.0
    return Logistic(float(weights[0] - centre @ image), by_name), tuple(image.tolist())


def _observations(
    name: str,
    captions: Sequence[JudgedCaption],
    records: Sequence[Record],
    image: Sequence[float] = (),
) -> list[Observation]:
    """What a fit of this name learns from, or is measured on.

    Args:
        name: of the fit.
        captions: which.
        records: of words, one for each caption.
        image: as Calibration has it, where that is known already.
    """
    found = []
    for caption, record in zip(captions, records, strict=True):
        evidence = caption.evidence
        if not name.startswith("grounded"):
            evidence = dataclasses.replace(evidence, token_groundings=None)
        if name.endswith("caption"):
            found.append(Observation(caption_signals(evidence, record, image), caption.right))
        else:
            found += [
                Observation(word_signals(evidence, word, record), right)
                for word, right in zip(evidence.words, caption.right_words, strict=True)
            ]
    return found


def _fit_report(
    name: str, calibration: Calibration, measuring: Mapping[str, Sequence[JudgedCaption]]
) -> FitReport:
    fitted: Logistic = getattr(calibration, name)
    by_kind = {
        kind: _observations(name, captions, [calibration.record] * len(captions), calibration.image)
        for kind, captions in measuring.items()
    }
    together = [each for observations in by_kind.values() for each in observations]
    return FitReport(
        uncalibrated=_reliability(AS_IT_IS, together),
        calibrated=_reliability(fitted, together),
        by_kind={kind: _reliability(fitted, own) for kind, own in by_kind.items()},
        signals={
            kind: {signal: _signal_auc(signal, own) for signal in fitted.weights}
            for kind, own in by_kind.items()
        },
    )


def _signal_auc(signal: str, observations: Sequence[Observation]) -> float | None:
    values = np.array([each.signals[signal] for each in observations])
    return auc(values, np.array([each.right for each in observations], dtype=np.bool_))


def fit_logistic(
    features: Float64Array, targets: Float64Array, penalties: Float64Array
) -> Float64Array:
    """Fit a logistic regression by Newton's method.

    Args:
        features: [n, k]; columns without a penalty are linearly independent.
        targets: [n], strictly between 0 and 1.
        penalties: [k], 0 or more, each times half the square of its weight.

    Returns:
        [k], the weights with which logistic(features @ weights) comes closest to the targets in
        cross-entropy, summed over the targets, with the penalties.
    """

    def loss(weights: Float64Array) -> float:
        log_odds = features @ weights
        cross_entropy = np.logaddexp(0.0, log_odds) - targets * log_odds
        return float(cross_entropy.sum() + penalties @ weights**2 / 2)

    weights = np.zeros(features.shape[1])
    for _ in range(_MOST_NEWTON_STEPS):
        predicted = _logistic(features @ weights)
        gradient = features.T @ (predicted - targets) + penalties * weights
        curvature = (features * (predicted * (1 - predicted))[:, None]).T @ features
        step = -np.linalg.solve(curvature + np.diag(penalties), gradient)
        # Halved until it lowers the loss: far from the best, full steps overshoot.
        while loss(weights + step) > loss(weights):
            step = step / 2
        weights = weights + step
        if np.abs(step).max() < _CONVERGED:
            break
    return weights


def measure_reliability(confidences: Sequence[float], right: Sequence[bool]) -> Reliability:
    """Compare confidences, each 0..1, with whether each caption is right; at least one caption."""
    confidence, labels = np.array(confidences), np.array(right, dtype=np.bool_)
    bins = _bins(confidence, labels)
    return Reliability(
        count=len(confidence),
        right=float(labels.mean()),
        mean_confidence=float(confidence.mean()),
        expected_calibration_error=_expected_calibration_error(bins),
        brier_score=float(((confidence - labels) ** 2).mean()),
        auc=auc(confidence, labels),
        bins=bins,
    )


def _reliability(fit: Logistic, observations: Sequence[Observation]) -> Reliability:
    confidences = [fit.confidence(each.signals) for each in observations]
    return measure_reliability(confidences, [each.right for each in observations])


def _platt_targets(labels: BoolArray) -> Float64Array:
    right, wrong = int(labels.sum()), int((~labels).sum())
    return np.where(labels, (right + 1) / (right + 2), 1 / (wrong + 2))


def _logistic(log_odds: Float64Array) -> Float64Array:
    probabilities: Float64Array = 0.5 + 0.5 * np.tanh(0.5 * log_odds)
    return probabilities


def _bins(confidence: Float64Array, labels: BoolArray) -> tuple[ReliabilityBin, ...]:
    members = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return tuple(
        _bin(number, confidence[members == number], labels[members == number])
        for number in range(NUM_BINS)
    )


def _bin(number: int, confidence: Float64Array, labels: BoolArray) -> ReliabilityBin:
    return ReliabilityBin(
        lower=number / NUM_BINS,
        upper=(number + 1) / NUM_BINS,
        count=len(confidence),
        mean_confidence=float(confidence.mean()) if len(confidence) else None,
        right=float(labels.mean()) if len(labels) else None,
    )


def _expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    distances = (
        one.count * abs(one.mean_confidence - one.right)
        for one in bins
        if one.mean_confidence is not None and one.right is not None
    )
    return sum(distances) / sum(one.count for one in bins)


def auc(confidence: Float64Array, labels: BoolArray) -> float | None:
    """The chance that a right one has a higher confidence than a wrong one, ties counted half.

    Args:
        confidence: [n], or anything else that is ordered.
        labels: bool [n], whether each is right.

    Returns:
        0..1; None unless there are right and wrong ones.
    """
    right, wrong = confidence[labels], np.sort(confidence[~labels])
    if not len(right) or not len(wrong):
        return None
    below = np.searchsorted(wrong, right, side="left")
    not_above = np.searchsorted(wrong, right, side="right")
    return float((below + not_above).mean() / 2 / len(wrong))
