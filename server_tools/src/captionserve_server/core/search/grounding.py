"""Grounding: what the image adds to the likelihood of captions that are there already.

A search asks for one token of each row at a time. Of finished captions all tokens are known, so all
of them are rows of one run, in which each sees those before it (teacher forcing): once without an
image, and with it where the log-probabilities of the search are not the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.search.logits_processors import LOGITS_PROCESSORS
from captionserve_server.core.step_model import Float32Array, ForcedRows

GROUNDING_SHARE = 0.2
"""Of the grounding in what reranks captions. With all of it the most unusual words win, right or
wrong; docs/adr/0021 has what was measured."""

ROWS_TOGETHER = 4
"""The rows of a request begin at a multiple of this, alone and with others. What a row sees is
summed in lanes, by its column modulo 4, and MatMulNBits multiplies rows by twos: elsewhere a row's
last bit is another one, of which quantised activations make much (docs/adr/0021)."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens that were given to a caption, the start token first, and those that were generated."""


def forced_rows(groups: Sequence[Sequence[Text]]) -> ForcedRows:
    """The rows of whole captions; those of a group share the rows with which they begin alike.

    What a group is told does not depend on the others: its rows begin at a multiple of
    ROWS_TOGETHER, and rows that nobody asks for fill it up to the next one.

    Args:
        groups: at least one, each of at least one caption with at least one generated token.

    Returns:
        rows, whose probes are the generated tokens, caption after caption.
    """
    tokens: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    probes: list[tuple[int, int]] = []
    for texts in groups:
        row_of: dict[tuple[int, ...], int] = {}
        for given, generated in texts:
            whole = (*given, *generated)
            row = -1
            # The last token is only asked for; nothing follows it.
            for end in range(1, len(whole)):
                beginning = whole[:end]
                if beginning not in row_of:
                    row_of[beginning] = len(parents)
                    tokens.append(whole[end - 1])
                    positions.append(end - 1)
                    parents.append(row)
                row = row_of[beginning]
                if end >= len(given):
                    probes.append((row, whole[end]))
        missing = -len(parents) % ROWS_TOGETHER
        tokens += [tokens[-1]] * missing
        positions += [0] * missing
        parents += [-1] * missing
    sees = np.eye(len(parents), dtype=np.bool_)
    for row, parent in enumerate(parents):
        # Parents come before their rows, so that all they see is known.
        if parent >= 0:
            sees[row] |= sees[parent]
    probe_rows, probe_tokens = np.array(probes, np.int64).T
    return ForcedRows(
        tokens=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        sees=sees,
        probe_rows=probe_rows,
        probe_tokens=probe_tokens,
    )


def has_own_logprobs(plan: CaptionPlan) -> bool:
    """Whether the token log-probabilities of a plan's captions are the model's own."""
    lowered = plan.options.num_beam_groups > 1
    return not lowered and not any(each.applies(plan) for each in LOGITS_PROCESSORS)


def grounded(
    captions: Sequence[DecodedCaption],
    plan: CaptionPlan,
    with_image: Float32Array,
    without: Float32Array,
    image_state: tuple[float, ...] = (),
) -> list[DecodedCaption]:
    """The captions to be returned, with their groundings.

    Args:
        captions: best first.
        plan: how they were decoded.
        with_image: log-probability of each token, caption after caption; the model's own.
        without: likewise, over no image.
        image_state: as each of them has it.

    Returns:
        the best num_return_sequences; in their own order, or, where the plan reranks by grounding,
        by the mean over their tokens of GROUNDING_SHARE x grounding + (1 - GROUNDING_SHARE) x
        log-probability with the image. Equals stay in their order.
    """
    ends = np.cumsum([len(caption.token_ids) for caption in captions])[:-1]
    differences = np.split(with_image - without, ends)
    found = [
        dataclasses.replace(caption, token_groundings=tuple(own.tolist()), image_state=image_state)
        for caption, own in zip(captions, differences, strict=True)
    ]
    if plan.options.rerank == "grounding":
        mixed = with_image - np.float32(GROUNDING_SHARE) * without
        means = [float(own.mean()) for own in np.split(mixed, ends)]
        order = sorted(range(len(found)), key=lambda number: -means[number])
        found = [found[number] for number in order]
    return found[: plan.options.num_return_sequences]
