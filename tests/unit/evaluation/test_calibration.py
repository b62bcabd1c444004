"""The fit of the confidence on data made to known weights, and its measures on counted examples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from captionserve_server.core.confidence import (
    SIGNALS,
    Calibration,
    Evidence,
    Logistic,
    SpokenWord,
    caption_signals,
    log_odds,
)
from captionserve_server.evaluation.calibration import (
    CannotCalibrateError,
    JudgedCaption,
    Observation,
    Tally,
    calibrate,
    fit_calibration,
    fit_logistic,
    fit_to_signals,
    measure_reliability,
)

WORDS = (SpokenWord("dog", 0, 1), SpokenWord("cat", 1, 2))
TRUE_CALIBRATION = Calibration(
    caption=Logistic(-3.0, {"log_odds": 0.7}), word=Logistic(-1.0, {"log_odds": 0.5})
)


def judged(logprobs: list[float], right: bool) -> JudgedCaption:
    """A caption without words."""
    return JudgedCaption(Evidence(logprobs, (), [0.0] * len(logprobs)), right, ())


def synthetic_captions(count: int, seed: int, highest: float = -1e-4) -> list[JudgedCaption]:
    """Captions as sure of themselves as a trained captioner, right as TRUE_CALIBRATION says."""
    rng = np.random.default_rng(seed)
    captions = []
    for _ in range(count):
        typical = -np.exp(rng.uniform(np.log(-highest), 0.0))
        logprobs = (typical * rng.uniform(0.2, 1.8, size=int(rng.integers(5, 15)))).tolist()
        # Groundings have nothing to do with being right.
        evidence = Evidence(logprobs, WORDS, rng.normal(2, 1, len(logprobs)).tolist())
        right = bool(rng.random() < TRUE_CALIBRATION.caption_confidence(evidence))
        right_words = [
            bool(rng.random() < TRUE_CALIBRATION.word_confidence(evidence, word)) for word in WORDS
        ]
        captions.append(JudgedCaption(evidence, right, right_words))
    return captions


def test_logistic_regression_recovers_the_weights_behind_exact_targets() -> None:
    rng = np.random.default_rng(0)
    features = np.stack((np.ones(200), rng.normal(5, 3, 200), rng.normal(-1, 10, 200)), axis=1)
    weights = np.array([-2.0, 0.9, 0.3])
    targets = 1 / (1 + np.exp(-features @ weights))
    assert fit_logistic(features, targets, np.zeros(3)) == pytest.approx(weights, rel=1e-6)


def test_logistic_regression_finds_the_best_where_full_newton_steps_overshoot() -> None:
    scores = np.repeat([-100.0, -3.0, 13.8], [12, 1121, 10])
    targets = np.repeat([0.99912, 0.99912, 0.3775], [12, 1121, 10])
    features = np.stack((np.ones_like(scores), scores), axis=1)
    predicted = 1 / (1 + np.exp(-features @ fit_logistic(features, targets, np.zeros(2))))
    # At the minimum of the cross-entropy its gradient vanishes.
    assert features.T @ (predicted - targets) == pytest.approx(np.zeros(2), abs=1e-6)


def test_a_penalty_holds_its_weights_near_0_and_makes_one_best_of_many() -> None:
    rng = np.random.default_rng(0)
    column = rng.normal(0, 1, 200)
    # The second and third say the same, so that without a penalty any share would do.
    features = np.stack((np.ones(200), column, column), axis=1)
    targets = 1 / (1 + np.exp(-2 * column))
    penalties = np.array([0.0, 3.0, 3.0])
    weights = fit_logistic(features, targets, penalties)
    predicted = 1 / (1 + np.exp(-features @ weights))
    gradient = features.T @ (predicted - targets) + penalties * weights
    assert gradient == pytest.approx(np.zeros(3), abs=1e-6)
    assert weights[1] == pytest.approx(weights[2])
    assert 0 < weights[1] + weights[2] < 2


def test_the_fit_recovers_the_calibration_behind_the_captions() -> None:
    fitted = fit_calibration(synthetic_captions(8000, seed=1))
    true = TRUE_CALIBRATION.caption
    assert fitted.caption.intercept == pytest.approx(true.intercept, rel=0.1)
    assert fitted.caption.weights == pytest.approx(true.weights, rel=0.1)
    true = TRUE_CALIBRATION.word
    assert fitted.word.weights["log_odds"] == pytest.approx(true.weights["log_odds"], rel=0.2)
    assert fitted.word.weights["caption_log_odds"] == pytest.approx(0.0, abs=0.1)


def test_the_fit_finds_what_the_image_says_beside_the_signals() -> None:
    true = (1.5, 0.0, -0.75, 0.0)
    rng = np.random.default_rng(5)
    captions = []
    for caption in synthetic_captions(6000, seed=1):
        # The third number says nothing, the last one never changes; scales differ.
        state = [*rng.normal((3.0, 0.0, -5.0), (0.5, 20.0, 2.0)).tolist(), 7.0]
        evidence = dataclasses.replace(caption.evidence, image_state=state)
        odds = -3.0 + 0.7 * evidence.log_odds + 1.5 * (state[0] - 3) - 0.75 * (state[2] + 5)
        right = bool(rng.random() < 1 / (1 + math.exp(-odds)))
        captions.append(dataclasses.replace(caption, evidence=evidence, right=right))
    fitted = fit_calibration(captions)
    assert fitted.image == pytest.approx(true, abs=0.15)
    assert fitted.image[3] == 0.0
    grounded = fitted.grounded_caption
    assert grounded is not None
    assert grounded.weights["image"] == 1.0
    assert grounded.weights["log_odds"] == pytest.approx(0.7, rel=0.1)
    # What it says of all images on average is in the intercept: that all are right as often.
    confidences = [fitted.caption_confidence(each.evidence) for each in captions]
    share = sum(each.right for each in captions) / len(captions)
    assert np.mean(confidences) == pytest.approx(share, abs=0.005)
    report = calibrate(captions[:3000], {"others": captions[3000:]})
    fit = report.fits["grounded_caption"]
    assert set(fit.signals["others"]) == set(SIGNALS["grounded_caption"])
    by_kind, without = fit.by_kind["others"], report.fits["caption"].by_kind["others"]
    assert (by_kind.auc or 0) > (without.auc or 1) + 0.03


def test_words_have_the_records_of_all_and_are_fitted_to_those_of_the_other_captions() -> None:
    said = [("dog", True), ("Dog", True), ("cat", False), ("dog", False), ("cat", True)]
    captions = [
        JudgedCaption(
            Evidence([-0.1 - number / 10], [SpokenWord(text, 0, 1)], [number / 2]), right, [right]
        )
        for number, (text, right) in enumerate(said)
    ]
    tally = Tally.of(captions)
    records = tally.records()
    assert set(records) == {"", "dog", "cat"}
    # Two words more, of which as many are right as of all: 4 of 7.
    assert records["dog"] == pytest.approx(math.log((2 + 8 / 7) / (1 + 6 / 7)))
    assert records[""] == pytest.approx(math.log(4 / 3))
    without = tally.record_without(Tally.of(captions[:1]))
    assert without(SpokenWord("DOG", 0, 1)) == pytest.approx(math.log((1 + 8 / 7) / (1 + 6 / 7)))
    assert without(SpokenWord("cat", 0, 1)) == records["cat"]


def test_captions_told_apart_without_fault_leave_a_doubt() -> None:
    captions = [judged([-0.01], True)] * 8 + [judged([-2.0], False)] * 8
    observations = [
        Observation(caption_signals(each.evidence, lambda word: 0.0), each.right)
        for each in captions
    ]
    fitted, image = fit_to_signals(["log_odds"], observations)
    assert image == ()
    # Platt's targets for 8 and 8: 9 / 10 and 1 / 10.
    assert fitted.confidence({"log_odds": log_odds(-0.01)}) == pytest.approx(0.9)
    assert fitted.confidence({"log_odds": log_odds(-2.0)}) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("captions", "named"),
    [
        ([], "right and wrong"),
        ([judged([-0.1], True), judged([-0.2], True)], "right and wrong"),
        ([judged([-0.1], False), judged([-0.2], False)], "right and wrong"),
        ([judged([-0.1], True), judged([-0.1], False)], "equally likely"),
        ([judged([-0.2], True), judged([-0.1], False)], "not more often right"),
    ],
)
def test_captions_that_teach_nothing_are_refused(captions: list[JudgedCaption], named: str) -> None:
    with pytest.raises(CannotCalibrateError, match=named):
        fit_calibration(captions)


def test_reliability_by_hand() -> None:
    confidences = [0.95, 1.0, 0.9, 0.15, 0.1]
    reliability = measure_reliability(confidences, [True, True, False, False, True])
    lowest, highest = reliability.bins[1], reliability.bins[9]
    assert (lowest.lower, lowest.upper, lowest.count) == (0.1, 0.2, 2)
    assert (highest.lower, highest.upper, highest.count) == (0.9, 1.0, 3)
    assert (lowest.mean_confidence, lowest.right) == pytest.approx((0.125, 0.5))
    assert (highest.mean_confidence, highest.right) == pytest.approx((0.95, 2 / 3))
    assert reliability.count == 5
    assert reliability.right == pytest.approx(3 / 5)
    assert reliability.mean_confidence == pytest.approx(0.62)
    # 2 captions 0.375 below, 3 captions 0.95 - 2/3 above.
    expected = (2 * 0.375 + 3 * (0.95 - 2 / 3)) / 5
    assert reliability.expected_calibration_error == pytest.approx(expected)
    squares = 0.05**2 + 0.0**2 + 0.9**2 + 0.15**2 + 0.9**2
    assert reliability.brier_score == pytest.approx(squares / 5)
    # Of the 6 pairs of a right and a wrong caption, 0.95 and 1.0 beat both wrong ones, 0.1 none.
    assert reliability.auc == pytest.approx(4 / 6)


def test_empty_bins_say_nothing_and_count_nothing() -> None:
    reliability = measure_reliability([0.55, 0.55], [True, False])
    assert [one.count for one in reliability.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert reliability.bins[0].mean_confidence is None
    assert reliability.bins[0].right is None
    assert reliability.expected_calibration_error == pytest.approx(0.05)


def test_ties_count_half_in_the_auc() -> None:
    assert measure_reliability([0.5, 0.5], [True, False]).auc == 0.5
    assert measure_reliability([0.9, 0.5, 0.5], [True, True, False]).auc == 0.75


@pytest.mark.parametrize("right", [True, False])
def test_there_is_no_auc_without_both_right_and_wrong(right: bool) -> None:
    assert measure_reliability([0.4, 0.6], [right, right]).auc is None


def test_a_calibration_is_measured_on_other_captions_together_and_by_kind() -> None:
    measuring = {
        "sure": synthetic_captions(1500, seed=3, highest=-1e-5),
        "unsure": synthetic_captions(1500, seed=4, highest=-1e-2),
    }
    report = calibrate(synthetic_captions(4000, seed=2), measuring)
    assert set(report.fits) == set(SIGNALS)
    for name, fit in report.fits.items():
        each = len(WORDS) if name.endswith("word") else 1
        assert fit.uncalibrated.count == fit.calibrated.count == 3000 * each
        counts = {kind: one.count for kind, one in fit.by_kind.items()}
        assert counts == {"sure": 1500 * each, "unsure": 1500 * each}
        assert fit.by_kind["sure"].right > fit.by_kind["unsure"].right
        assert fit.calibrated.expected_calibration_error < 0.05
        assert fit.uncalibrated.expected_calibration_error > 0.1
        # The captions have no image.
        assert set(fit.signals["sure"]) == set(SIGNALS[name]) - {"image"}
    caption = report.fits["caption"]
    # A confidence that rises with another one sorts captions alike, as its only signal does.
    assert caption.calibrated.auc == caption.uncalibrated.auc
    assert caption.signals["sure"]["log_odds"] == caption.by_kind["sure"].auc
    # A signal that has nothing to do with being right is worth nothing alone.
    by_itself = report.fits["grounded_caption"].signals["unsure"]["grounding"]
    assert by_itself == pytest.approx(0.5, abs=0.05)
