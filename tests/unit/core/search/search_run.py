"""A search on the fake step model, without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from captionserve_server.core.captions import CaptionPlan, DecodedCaption, SpecialTokens
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import Search, SearchStep, Vocabulary, start_search
from captionserve_server.core.step_model import StepAnswer, StepBatch

from tests.reference_search import Rules, Tokens
from tests.unit.core.fake_step_model import END, START, VOCABULARY_SIZE, FakeStepModel

VOCABULARY = Vocabulary(SpecialTokens(START, (END, 3)), VOCABULARY_SIZE)


class Run:
    """A search with its captions' slots on the fake; lane and image have one number at first."""

    def __init__(self, plans: Sequence[CaptionPlan], first_image: int = 0) -> None:
        self.model = FakeStepModel(len(plans))
        images = np.arange(first_image, first_image + len(plans), dtype=np.float32)
        self.slots = self.model.prefill(np.tile(images[:, None, None], (1, 2, 3)))
        self.search: Search = start_search(plans[0].options, VOCABULARY)
        for plan in plans:
            self.search = self.search.joined(plan)

    def ask(self) -> tuple[SearchStep, StepAnswer]:
        step = self.search.step()
        return step, self.model.step(StepBatch(self.slots, step.row_counts, step.rows))

    def advance(self) -> None:
        step, answer = self.ask()
        self.search = step.advance(answer)

    def finished_captions(self) -> list[list[DecodedCaption]]:
        """Step until nothing is left; each lane's captions in the order of the lanes at first."""
        captions: dict[int, list[DecodedCaption]] = {}
        here = list(range(len(self.search)))
        while here:
            self.advance()
            finished = self.search.finished
            for lane in np.flatnonzero(finished):
                captions[here[lane]] = self.search.captions(int(lane))
            here = [number for number, goes in zip(here, finished, strict=True) if not goes]
            self.search = self.search.kept(~finished)
            self.slots = self.slots[~finished]
        return [captions[number] for number in sorted(captions)]


def rules_of(options: DecodingOptions, given_tokens: Tokens, beams: int) -> Rules:
    return Rules(
        given=given_tokens,
        end=frozenset(VOCABULARY.special.end),
        beams=beams,
        longest=options.max_length - len(given_tokens),
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
    )
