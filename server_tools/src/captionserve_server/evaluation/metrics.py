"""Scores predicted captions against scenes whose facts are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from captionserve_server.demo.captions import parse_caption
from captionserve_server.demo.facts import ObjectFact, SceneFacts


class TrueScene(Protocol):
    """What scoring needs of a scene: its true caption and the facts behind it."""

    @property
    def caption(self) -> str:
        """The one true caption."""

    @property
    def facts(self) -> SceneFacts:
        """The facts that it states."""


@dataclass(frozen=True)
class EvaluationReport:
    """Shares of what was said rightly, each 0..1, and two corpus metrics of image captioning.

    A caption that does not follow the scenes' wording has everything wrong.

    Attributes:
        scenes: how many scenes were captioned.
        object_accuracy: of all objects shown, those named.
        colour_accuracy: of all objects shown whose kind comes in colours, those named in the
            right colour.
        relation_accuracy: of all scenes of two objects, those where the relation is right.
        background_accuracy: of all scenes, those whose background's colour is right.
        exact_captions: of all scenes, those whose whole caption is right word for word.
        bleu_4: corpus BLEU of up to four words, 0..100.
        cider_d: corpus CIDEr-D, 0..10.
    """

    scenes: int
    object_accuracy: float
    colour_accuracy: float
    relation_accuracy: float
    background_accuracy: float
    exact_captions: float
    bleu_4: float
    cider_d: float


def score_captions(scenes: Sequence[TrueScene], predictions: Sequence[str]) -> EvaluationReport:
    """Compare one predicted caption for each scene with the truth."""
    if len(scenes) != len(predictions) or not scenes:
        raise ValueError("give one prediction for each scene, and at least one scene")
    said = [_normalise(text) for text in predictions]
    true = [scene.caption for scene in scenes]
    pairs = [
        (scene.facts, parse_caption(text)) for scene, text in zip(scenes, predictions, strict=True)
    ]
    return EvaluationReport(
        scenes=len(scenes),
        object_accuracy=_share(_objects_named(*pair) for pair in pairs),
        colour_accuracy=_share(_colours_named(*pair) for pair in pairs),
        relation_accuracy=_share(_relation_named(*pair) for pair in pairs),
        background_accuracy=_share(_background_named(*pair) for pair in pairs),
        exact_captions=sum(map(is_exact, predictions, true)) / len(true),
        bleu_4=_bleu_4(said, true),
        cider_d=cider_d(said, true),
    )


def is_exact(said: str, true: str) -> bool:
    """Tell whether a caption is right word for word; case and spacing do not matter."""
    return _normalise(said) == true


def right_words(said: Sequence[str], true: str) -> list[bool]:
    """Tell of each word said whether the true caption has it, in the same order; case is ignored.

    Of words that both have in another order, those of the longest runs are right.
    """
    words = [word.lower() for word in said]
    matcher = SequenceMatcher(a=words, b=true.split(), autojunk=False)
    right = [False] * len(words)
    for block in matcher.get_matching_blocks():
        right[block.a : block.a + block.size] = [True] * block.size
    return right


def _bleu_4(said: Sequence[str], true: Sequence[str]) -> float:
    scores, _ = Bleu(4).compute_score(*_by_image(true, said), verbose=0)
    return float(100 * scores[3])


def cider_d(said: Sequence[str], true: Sequence[str]) -> float:
    """Corpus CIDEr-D of one caption for each image against one true caption, 0..10."""
    # The library's Cider is CIDEr-D: clipped counts and a penalty on length.
    score, _ = Cider().compute_score(*_by_image(true, said))
    return float(score)


def _by_image(*captions: Sequence[str]) -> list[dict[int, list[str]]]:
    """Captions as the library wants them: image number to a list of texts."""
    return [{image: [text] for image, text in enumerate(texts)} for texts in captions]


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class _Tally:
    """How many of the facts in question were right."""

    right: int
    asked: int


def _share(tallies: Iterable[_Tally]) -> float:
    """Return right over asked, over all scenes; 1 if nothing was asked."""
    right = asked = 0
    for tally in tallies:
        right, asked = right + tally.right, asked + tally.asked
    return right / asked if asked else 1.0


def _objects_named(true: SceneFacts, said: SceneFacts | None) -> _Tally:
    kinds = Counter(fact.kind for fact in true.objects)
    named = Counter(fact.kind for fact in said.objects) if said else Counter[str]()
    return _Tally((kinds & named).total(), kinds.total())


def _colours_named(true: SceneFacts, said: SceneFacts | None) -> _Tally:
    coloured = Counter(fact for fact in true.objects if fact.colour is not None)
    named = Counter(said.objects) if said else Counter[ObjectFact]()
    return _Tally((coloured & named).total(), coloured.total())


def _relation_named(true: SceneFacts, said: SceneFacts | None) -> _Tally:
    asked = true.relation is not None
    return _Tally(int(asked and said is not None and said.relation is true.relation), int(asked))


def _background_named(true: SceneFacts, said: SceneFacts | None) -> _Tally:
    return _Tally(int(said is not None and said.background == true.background), 1)
