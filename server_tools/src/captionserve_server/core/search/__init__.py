"""The decoding methods, and which of them the options ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.base import Search, SearchStep, Vocabulary
from captionserve_server.core.search.beam import BeamSearch
from captionserve_server.core.search.constrained import ConstrainedBeamSearch
from captionserve_server.core.search.rowwise import (
    GreedySearch,
    SamplingSearch,
    candidates_drawn_from,
)

__all__ = ["Search", "SearchStep", "Vocabulary", "search_kind", "start_search"]


def search_kind(options: DecodingOptions, vocabulary: Vocabulary) -> Hashable:
    """What captions must have in common to be lanes of one search."""
    if options.do_sample:
        # Drawing from all tokens takes a sort of the vocabulary, which others are spared.
        from_all = candidates_drawn_from(options, vocabulary.size) == vocabulary.size
        return "sample", options.rows, from_all
    return options.num_beams, options.num_beam_groups, bool(options.force_words)


def start_search(options: DecodingOptions, vocabulary: Vocabulary) -> Search:
    """A search without lanes for captions of the options' kind."""
    if options.do_sample:
        return SamplingSearch.without_lanes(vocabulary, options)
    if options.force_words:
        return ConstrainedBeamSearch.without_lanes(vocabulary, options)
    if options.num_beams > 1:
        beams = BeamSearch.without_lanes(vocabulary, options)
        return dataclasses.replace(beams, groups=options.num_beam_groups)
    return GreedySearch.without_lanes(vocabulary, options)
