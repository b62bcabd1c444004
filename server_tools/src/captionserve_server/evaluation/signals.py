"""Which signals tell right captions from wrong ones, alone and together, in the unseen style.

    python -m captionserve_server.evaluation.signals MODEL_REPOSITORY [--fit-scenes N] [--scenes N]

Prints JSON: areas under the ROC curve (AUC) among the captions, or words, of scenes of the unseen
style that no fit has seen, and shares of right captions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from captionserve_server.core.confidence import (
    SIGNALS,
    Record,
    caption_signals,
    log_odds,
    word_signals,
)
from captionserve_server.core.search.grounding import forced_rows
from captionserve_server.demo.captions import parse_caption
from captionserve_server.demo.facts import ObjectFact
from captionserve_server.demo.kinds import KINDS
from captionserve_server.evaluation.calibration import (
    BoolArray,
    Float64Array,
    Observation,
    Tally,
    auc,
    fit_to_signals,
)
from captionserve_server.evaluation.held_out import Split
from captionserve_server.evaluation.judging import JudgedScene, judged_scenes
from captionserve_server.evaluation.metrics import is_exact
from captionserve_server.local import FinishedCaption, LocalCaptioner
from captionserve_server.local.model_folder import load_model
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime.graph_step_model import GraphStepModel

NUM_BEAMS = 4
FIT_SEED, SEED = 1, 2
KIND_GROUPS = 5
"""So many times the kinds of a group are kept out of a fit, and measured on."""
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Of the log-probability without image in what reranks."""
_DRAWS = 200

LOG_ODDS = ("log_odds",)
GROUNDINGS = ("grounding", "least_grounding")
TOGETHER: Mapping[str, Sequence[str]] = {
    "log_odds": LOG_ODDS,
    "log_odds, groundings": (*LOG_ODDS, *GROUNDINGS),
    "log_odds, record": (*LOG_ODDS, "record"),
    "log_odds, record, groundings": (*LOG_ODDS, "record", *GROUNDINGS),
    "log_odds, image": (*LOG_ODDS, "image"),
    "log_odds, record, image": (*LOG_ODDS, "record", "image"),
    "log_odds, record, groundings, image": SIGNALS["grounded_caption"],
}
"""Signals of captions that are fitted together, by name."""
WORDS: Mapping[str, Sequence[str]] = {
    "log_odds": LOG_ODDS,
    "log_odds, caption_log_odds, record": SIGNALS["word"],
    "log_odds, caption_log_odds, record, grounding": SIGNALS["grounded_word"],
    "log_odds, caption_log_odds, record, grounding, image": (*SIGNALS["grounded_word"], "image"),
}
"""Likewise of words."""


def signals_of(scene: JudgedScene, record: Record) -> dict[str, float]:
    """All signals of its best caption but the image's."""
    evidence = scene.judged.evidence
    sums = [math.fsum(caption.token_logprobs) for caption in scene.said]
    return caption_signals(evidence, record) | {
        "product": log_odds(sums[0]),
        "least_likely": log_odds(min(evidence.token_logprobs)),
        "beam_share": -math.log(math.fsum(math.exp(each - sums[0]) for each in sums)),
        "grounding_sum": math.fsum(evidence.token_groundings or ()),
    }


@dataclasses.dataclass(frozen=True)
class Judged:
    """Captions, or words, with their signals.

    Attributes:
        observations: the signals, and what is right.
        states: [observations, encoder width], mean encoder state of each.
    """

    observations: list[Observation]
    states: Float64Array

    @property
    def right(self) -> BoolArray:
        """[observations]."""
        return np.array([each.right for each in self.observations], np.bool_)

    @classmethod
    def captions(cls, scenes: Sequence[JudgedScene], records: Iterable[Record]) -> Judged:
        """The best caption of each scene, given a record of words for each."""
        observations = [
            Observation(signals_of(scene, record), scene.judged.right)
            for scene, record in zip(scenes, records, strict=True)
        ]
        return cls(observations, np.array([each.judged.evidence.image_state for each in scenes]))

    @classmethod
    def words(cls, scenes: Sequence[JudgedScene], records: Iterable[Record]) -> Judged:
        """The words of the best caption of each scene, likewise."""
        found, states = [], []
        for scene, record in zip(scenes, records, strict=True):
            evidence = scene.judged.evidence
            for word, right in zip(evidence.words, scene.judged.right_words, strict=True):
                found.append(Observation(word_signals(evidence, word, record), right))
                states.append(evidence.image_state)
        return cls(found, np.array(states))


def confidences(signals: Sequence[str], fitting: Judged, measuring: Judged) -> Float64Array:
    """Fit to the signals of some, and return the confidences in others; [observations]."""
    named = [signal for signal in signals if signal != "image"]
    with_image = len(named) < len(signals)
    states = fitting.states if with_image else None
    fit, image = fit_to_signals(named, fitting.observations, states)
    of_images = measuring.states @ np.array(image) if with_image else np.zeros(len(measuring.right))
    return np.array(
        [
            fit.confidence({**each.signals, "image": of_image})
            for each, of_image in zip(measuring.observations, of_images.tolist(), strict=True)
        ]
    )


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes of which some teach and others are measured on.

    Attributes:
        strange: to fit to, of the unseen style.
        known: to fit to, of the styles that training saw.
        measured: others of the unseen style.
    """

    strange: list[JudgedScene]
    known: list[JudgedScene]
    measured: list[JudgedScene]

    def judged(self, *, words: bool = False) -> tuple[Judged, Judged]:
        """The captions, or words, of those to fit to and of those to measure on."""
        fitting = [*self.strange, *self.known]
        captions = [scene.judged for scene in fitting]
        tally = Tally.of(captions)
        # A record that has the caption's own words would know too much of it.
        own = [tally.record_without(Tally.of([caption])) for caption in captions]
        others = [tally.record_without(Tally(Counter(), Counter()))] * len(self.measured)
        make = Judged.words if words else Judged.captions
        return make(fitting, own), make(self.measured, others)


def with_error(values: Float64Array, right: BoolArray) -> dict[str, float | None]:
    """An AUC with its standard error, from drawing the captions anew."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(right), size=len(right)) for _ in range(_DRAWS)]
    found = [drawn for at in draws if (drawn := auc(values[at], right[at])) is not None]
    return {"auc": auc(values, right), "standard_error": float(np.std(found))}


def by_fit_scenes(scenes: Scenes) -> dict[str, dict[str, float | None]]:
    """Log-odds and record, and all that is used, fitted to fewer scenes of each split."""
    report: dict[str, dict[str, float | None]] = {}
    count = len(scenes.strange)
    while count >= min(500, len(scenes.strange)):
        fewer = Scenes(scenes.strange[:count], scenes.known[:count], scenes.measured)
        fitting, measuring = fewer.judged()
        report[str(count)] = {
            name: auc(confidences(TOGETHER[name], fitting, measuring), measuring.right)
            for name in ("log_odds, record, groundings", "log_odds, record, groundings, image")
        }
        count //= 2
    return report


def drawings_apart(scenes: Scenes) -> dict[str, float | None]:
    """What the fits are worth on scenes with a drawing that no scene of the fit has.

    The kinds are in the fit in the styles that training saw.
    """
    names = ("log_odds", "log_odds, record, groundings", "log_odds, record, groundings, image")
    found: dict[str, list[Float64Array]] = {name: [] for name in names}
    right = []
    for group in range(KIND_GROUPS):
        kinds = set(KINDS[group::KIND_GROUPS])

        def has_one(scene: JudgedScene, kinds: set[str] = kinds) -> bool:
            return any(fact.kind in kinds for fact in scene.facts.objects)

        apart = Scenes(
            [scene for scene in scenes.strange if not has_one(scene)],
            scenes.known,
            [scene for scene in scenes.measured if has_one(scene)],
        )
        fitting, measuring = apart.judged()
        right.append(measuring.right)
        for name in names:
            found[name].append(confidences(TOGETHER[name], fitting, measuring))
    labels = np.concatenate(right)
    return {name: auc(np.concatenate(values), labels) for name, values in found.items()}


def who_knows_what_is_shown(scenes: Scenes) -> float | None:
    """The AUC of how often all that a scene truly shows was named rightly in those of the fit."""

    def named(scene: JudgedScene) -> list[tuple[ObjectFact, bool]]:
        said = parse_caption(scene.said[0].text)
        return [(fact, said is not None and fact in said.objects) for fact in scene.facts.objects]

    shown, right = Counter[ObjectFact](), Counter[ObjectFact]()
    for scene in scenes.strange:
        for fact, was_named in named(scene):
            shown[fact] += 1
            right[fact] += was_named
    chances = [
        math.fsum(math.log((right[fact] + 0.5) / (shown[fact] + 1)) for fact, _ in named(scene))
        for scene in scenes.measured
    ]
    return auc(np.array(chances), np.array([scene.judged.right for scene in scenes.measured]))


def no_image(folder: Path, scenes: Sequence[JudgedScene]) -> dict[str, float | None]:
    """The AUC of the least grounding alone, over different things in place of no image."""
    model = load_model(folder, version=None, threads=0)
    geometry, start = model.bundle.geometry, model.bundle.special.start
    height, width = model.preprocessor.encoder_size()
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width))
    pixels = np.stack((noise, np.full_like(noise, 128))).astype(np.uint8)
    (states,) = model.encoder.run({graph_tensors.PIXELS: pixels})
    step_model = GraphStepModel(model.decoder, geometry, len(pixels))
    noise_slot, gray_slot = step_model.prefill(states).tolist()
    right = np.array([scene.judged.right for scene in scenes])
    report: dict[str, float | None] = {}
    slots: dict[str, int | None] = {"states of 0": None, "noise": noise_slot, "gray": gray_slot}
    for name, slot in slots.items():
        least = []
        for scene in scenes:
            best = scene.said[0]
            without = step_model.forced_logprobs(slot, forced_rows([[((start,), best.token_ids)]]))
            least.append(float((np.array(best.token_logprobs) - without).min()))
        report[name] = auc(np.array(least), right)
    return report


def is_right(caption: FinishedCaption, scene: JudgedScene) -> bool:
    """Whether it is right word for word."""
    return is_exact(caption.text, scene.caption)


def reranked(scenes: Sequence[JudgedScene]) -> dict[str, float]:
    """The share of right captions, chosen among the beams' with each of SHARES."""

    def value(caption: FinishedCaption, share: float) -> float:
        logprobs = np.array(caption.token_logprobs)
        without = logprobs - np.array(caption.token_groundings)
        return float((logprobs - share * without).mean())

    report: dict[str, float] = {}
    for share in SHARES:
        by_value = functools.partial(value, share=share)
        chosen = [max(scene.said, key=by_value) for scene in scenes]
        right = map(is_right, chosen, scenes)
        report[str(share)] = sum(right) / len(scenes)
    return report


def measure(folder: Path, fit_scenes: int, count: int) -> dict[str, object]:
    """Caption, fit and measure; the report as JSON values."""
    with LocalCaptioner(folder) as captioner:

        def judged(split: Split, count: int, seed: int) -> list[JudgedScene]:
            return list(judged_scenes(captioner, split, count, seed, NUM_BEAMS))

        strange = judged("unseen_style", fit_scenes, FIT_SEED)
        known = judged("unseen_combinations", fit_scenes, FIT_SEED)
        measured = judged("unseen_style", count, SEED)
        combinations = judged("unseen_combinations", count, SEED)
    scenes = Scenes(strange, known, measured)
    fitting, measuring = scenes.judged()
    fitting_words, measuring_words = scenes.judged(words=True)
    right, right_words = measuring.right, measuring_words.right
    alone = measuring.observations[0].signals
    return {
        "right": float(right.mean()),
        "captions, alone": {
            name: auc(np.array([each.signals[name] for each in measuring.observations]), right)
            for name in alone
        },
        "captions, together": {
            name: with_error(confidences(signals, fitting, measuring), right)
            for name, signals in TOGETHER.items()
        },
        "words, together": {
            name: auc(confidences(signals, fitting_words, measuring_words), right_words)
            for name, signals in WORDS.items()
        },
        "by scenes of each split in the fit": by_fit_scenes(scenes),
        "drawings apart": drawings_apart(scenes),
        "who knows what is shown": who_knows_what_is_shown(scenes),
        "least grounding over": no_image(folder, measured),
        "right when reranked": {
            "unseen style": reranked(measured),
            "unseen style, scenes of the fit": reranked(strange),
            "unseen combinations": reranked(combinations),
        },
        "right among the beams": float(
            np.mean([any(is_right(said, each) for said in each.said) for each in measured])
        ),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_repository", type=Path)
    parser.add_argument("--fit-scenes", type=int, default=4000)
    parser.add_argument("--scenes", type=int, default=1000)
    given = parser.parse_args()
    report = {
        "command": (
            "python -m captionserve_server.evaluation.signals MODEL_REPOSITORY"
            f" --fit-scenes {given.fit_scenes} --scenes {given.scenes}"
        ),
        "fit_scenes": given.fit_scenes,
        "scenes": given.scenes,
        **measure(given.model_repository, given.fit_scenes, given.scenes),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
