"""The metrics, on cases small enough to check by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from captionserve_server.demo.captions import parse_caption
from captionserve_server.demo.facts import SceneFacts
from captionserve_server.evaluation.metrics import score_captions

TRUE_CAPTIONS = (
    "a red apple to the left of a dog face on a blue background",
    "a fox above a blue book on a white background",
    "an owl on a black background",
)


class KnownScene:
    """A scene of which only the caption matters."""

    def __init__(self, caption: str) -> None:
        facts = parse_caption(caption)
        assert facts is not None
        self.caption = caption
        self.facts: SceneFacts = facts


SCENES = [KnownScene(caption) for caption in TRUE_CAPTIONS]


def test_the_truth_scores_full_marks() -> None:
    report = score_captions(SCENES, TRUE_CAPTIONS)
    assert report.scenes == 3
    assert report.object_accuracy == report.colour_accuracy == report.relation_accuracy == 1.0
    assert report.background_accuracy == report.exact_captions == 1.0
    assert report.bleu_4 == pytest.approx(100.0)
    assert report.cider_d == pytest.approx(10.0)


def test_each_mistake_counts_where_it_belongs() -> None:
    report = score_captions(
        SCENES,
        [
            "a green apple to the right of a dog face on a blue background",
            "a cat face above a blue book on a red background",
            "An owl on a  black background",
        ],
    )
    assert report.object_accuracy == pytest.approx(4 / 5)
    assert report.colour_accuracy == pytest.approx(1 / 2)
    assert report.relation_accuracy == pytest.approx(1 / 2)
    assert report.background_accuracy == pytest.approx(2 / 3)
    assert report.exact_captions == pytest.approx(1 / 3)
    assert 0 < report.bleu_4 < 100
    assert 0 < report.cider_d < 10


def test_nonsense_scores_nothing() -> None:
    report = score_captions(SCENES, ["", "fox fox fox", "<|endoftext|>"])
    assert report.object_accuracy == report.relation_accuracy == report.exact_captions == 0.0
    assert report.bleu_4 == pytest.approx(0.0, abs=1e-6)
    assert report.cider_d < 0.5


def test_nothing_asked_is_nothing_wrong() -> None:
    report = score_captions(SCENES[2:], TRUE_CAPTIONS[2:])
    assert report.relation_accuracy == report.colour_accuracy == 1.0


@pytest.mark.parametrize("predictions", [[], ["an owl on a black background"]])
def test_every_scene_needs_one_prediction(predictions: list[str]) -> None:
    with pytest.raises(ValueError, match="one prediction for each"):
        score_captions(SCENES, predictions)


def test_the_metrics_load_no_deep_learning_framework() -> None:
    code = (
        "import sys, captionserve_server.evaluation.metrics, "
        "captionserve_server.evaluation.held_out; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
