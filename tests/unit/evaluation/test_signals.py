"""What the table of signals is made of, on scenes of which everything is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.core.confidence import Evidence, spoken_words
from captionserve_server.demo.facts import ObjectFact, Relation, SceneFacts
from captionserve_server.evaluation.calibration import JudgedCaption
from captionserve_server.evaluation.judging import JudgedScene, judged_scenes
from captionserve_server.evaluation.metrics import is_exact, right_words
from captionserve_server.evaluation.signals import (
    LOG_ODDS,
    Scenes,
    confidences,
    no_image,
    reranked,
    who_knows_what_is_shown,
)
from captionserve_server.local import FinishedCaption, LocalCaptioner

from tests.conftest import DEMO


def said(text: str, logprob: float, grounding: float) -> FinishedCaption:
    """A caption of one token that is all of its text."""
    return FinishedCaption(
        text=text,
        score=logprob,
        token_ids=(1,),
        token_logprobs=(logprob,),
        finish_reason="eos",
        token_texts=(text,),
        confidence=0.5,
        degenerate=False,
        words=(),
        token_groundings=(grounding,),
        grounding=grounding,
        review_reasons=(),
        attention=None,
    )


def scene(kind: str, *captions: FinishedCaption, state: float = 0.0) -> JudgedScene:
    """A scene of one object on white; its captions, best first."""
    true = f"a {kind} on a white background"
    best = captions[0]
    words = spoken_words(best.token_texts)
    evidence = Evidence(best.token_logprobs, words, best.token_groundings, (state,))
    judged = JudgedCaption(
        evidence, is_exact(best.text, true), right_words(best.text.split(), true)
    )
    return JudgedScene(SceneFacts(ObjectFact(kind), "white"), true, captions, judged)


FOX, OWL = "a fox on a white background", "a owl on a white background"


def test_the_share_of_the_grounding_decides_which_caption_is_chosen() -> None:
    # Without image their log-probabilities are -1 and -4.
    one = scene("owl", said(FOX, -0.5, 0.5), said(OWL, -1.0, 3.0))
    right = reranked([one, scene("fox", said(FOX, -0.1, 0.1))])
    # 0.5 in log-probability is less than a share of 3 from a sixth on.
    assert right == {"0.0": 0.5, "0.1": 0.5, "0.2": 1.0, "0.3": 1.0, "0.5": 1.0, "1.0": 1.0}


def test_who_knows_what_is_shown_knows_how_often_it_was_named() -> None:
    foxes = [scene("fox", said(FOX, -0.5, 1.0))] * 3 + [scene("fox", said(OWL, -0.5, 1.0))]
    owls = [scene("owl", said(OWL, -0.5, 1.0))] + [scene("owl", said(FOX, -0.5, 1.0))] * 3
    # A fox that is right before an owl that is wrong, and the other way round.
    ordered = [scene("fox", said(FOX, -0.5, 1.0)), scene("owl", said(FOX, -0.5, 1.0))]
    assert who_knows_what_is_shown(Scenes(foxes + owls, [], ordered)) == 1.0
    turned = [scene("fox", said(OWL, -0.5, 1.0)), scene("owl", said(OWL, -0.5, 1.0))]
    assert who_knows_what_is_shown(Scenes(foxes + owls, [], turned)) == 0.0


def test_the_image_tells_what_the_decoder_does_not() -> None:
    # Alike sure of both, and a state that says which is wrong.
    logprobs = [-0.1 - number % 7 / 20 for number in range(60)]
    strange = [
        scene("fox", said(FOX if number % 2 else OWL, logprob, 1.0), state=float(number % 2))
        for number, logprob in enumerate(logprobs)
    ]
    known = [scene("fox", said(FOX, -0.05, 1.0), state=0.5)] * 5
    fitting, measuring = Scenes(strange, known, strange[:10]).judged()
    found = confidences((*LOG_ODDS, "image"), fitting, measuring)
    assert min(found[1::2]) > 0.8
    assert max(found[::2]) < 0.2
    without = confidences(LOG_ODDS, fitting, measuring)
    assert max(without[::2]) > min(without[1::2])


def test_scenes_of_the_demo_are_judged_and_no_image_has_the_groundings_that_they_have(
    model_repository: Callable[[str], Path],
) -> None:
    folder = model_repository(DEMO)
    with LocalCaptioner(folder) as captioner:
        scenes = list(judged_scenes(captioner, "unseen_style", 40, 2, 4))
    assert len(scenes) == 40
    assert {len(each.said) for each in scenes} == {4}
    for each in scenes:
        assert each.judged.right == (each.said[0].text == each.caption)
        assert each.judged.evidence.image_state == each.said[0].image_state
        named = (each.facts.relation or Relation.ABOVE).value
        assert named in each.caption or each.facts.other is None
    least = [min(each.said[0].token_groundings or ()) for each in scenes]
    right = [value for value, each in zip(least, scenes, strict=True) if each.judged.right]
    wrong = [value for value, each in zip(least, scenes, strict=True) if not each.judged.right]
    pairs = [(one > other) + (one == other) / 2 for one in right for other in wrong]
    found = no_image(folder, scenes)
    assert found["states of 0"] == pytest.approx(sum(pairs) / len(pairs), abs=0.02)
    assert len(set(found.values())) == 3
