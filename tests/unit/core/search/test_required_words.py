"""Progress by one token at a time is what the whole row has."""

from __future__ import annotations

import numpy as np
from captionserve_server.core.search.required_words import Progress
from captionserve_server.core.words import ForcedWord
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_search import Constraint

TOKENS = (5, 6, 7, 300)
UNUSED = 4
forms = st.lists(st.sampled_from(TOKENS[:3]), min_size=1, max_size=6).map(tuple)
words = st.lists(st.builds(ForcedWord, forms, st.none() | forms), min_size=0, max_size=4)
rows = st.lists(
    st.lists(st.sampled_from([*TOKENS, UNUSED]), min_size=9, max_size=9), min_size=1, max_size=3
)


@settings(max_examples=300, deadline=None)
@given(words, rows)
def test_progress_is_what_its_definition_says(
    forced: list[ForcedWord], generated: list[list[int]]
) -> None:
    constraints = [Constraint(word.spaced, word.initial) for word in forced]
    progress = Progress.begin(forced, len(generated))
    table = np.array(generated)
    for size in range(table.shape[1]):
        prospects = progress.prospects
        for row, tokens in enumerate(generated):
            before = tuple(tokens[:size])
            unmet = [each for each in constraints if not each.is_met(before)]
            assert progress.complete[row] == (not unmet)
            advancing = {token for each in unmet for token in each.advancing(before)}
            for token in (*TOKENS, UNUSED):
                column = int(progress.words.columns(np.array([token]))[0])
                after = (*before, token)
                left = [each for each in constraints if not each.is_met(after)]
                met = sum(each.length for each in constraints if each.is_met(after))
                bank = met + max((each.progress(after) for each in left), default=0)
                assert prospects.banks[row, column] == bank
                assert prospects.complete[row, column] == (not left)
                assert prospects.advancing[row, column] == (token in advancing)
        progress = progress.followed_by(np.arange(len(generated)), table[:, size])


def test_rows_may_be_taken_in_any_order() -> None:
    forced = [ForcedWord((1, 2), None), ForcedWord((3,), None)]
    progress = Progress.begin(forced, 2).followed_by(np.array([0, 0]), np.array([1, 3]))
    crossed = progress.followed_by(np.array([1, 0]), np.array([9, 2]))
    assert crossed.lacking.tolist() == [[True, False], [False, True]]
