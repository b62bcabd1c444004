"""Captions held-out scenes in this process, and judges what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from captionserve_server.core.confidence import Evidence, SpokenWord
from captionserve_server.demo.facts import SceneFacts
from captionserve_server.evaluation.calibration import JudgedCaption
from captionserve_server.evaluation.held_out import Split, held_out_scenes
from captionserve_server.evaluation.metrics import is_exact, right_words
from captionserve_server.local import FinishedCaption, LocalCaptioner


@dataclass(frozen=True)
class JudgedScene:
    """What was said of a scene, and what is true of it.

    Attributes:
        facts: what it shows.
        caption: what is true.
        said: the captions, best first.
        judged: the best one, with its groundings.
    """

    facts: SceneFacts
    caption: str
    said: tuple[FinishedCaption, ...]
    judged: JudgedCaption


def judged_scenes(
    captioner: LocalCaptioner, split: Split, count: int, seed: int, num_beams: int
) -> Iterator[JudgedScene]:
    """Caption `count` scenes, each with all its beams and their groundings.

    Args:
        captioner: of the model.
        split: which scenes; always the same for a seed.
        count: how many.
        seed: of the scenes.
        num_beams: of the beam search.
    """
    truths: list[tuple[SceneFacts, str]] = []

    def images() -> Iterator[Image.Image]:
        # Drawn as they are wanted: thousands would take gigabytes.
        for scene in held_out_scenes(split, count, seed):
            truths.append((scene.facts, scene.caption))
            yield scene.image

    results = captioner.caption_each(
        images(), num_beams=num_beams, num_return_sequences=num_beams, output_grounding=True
    )
    for number, result in enumerate(results):
        if isinstance(result, Exception):
            raise result
        facts, caption = truths[number]
        best = result.captions[0]
        words = [SpokenWord(word.text, word.first_token, word.tokens) for word in best.words]
        judged = JudgedCaption(
            Evidence(best.token_logprobs, words, best.token_groundings, best.image_state),
            is_exact(best.text, caption),
            right_words([word.text for word in words], caption),
        )
        yield JudgedScene(facts, caption, result.captions, judged)
