"""Facts to text and back: the one wording of every demo caption."""

from __future__ import annotations

import re

from captionserve_server.demo.facts import (
    BACKGROUND_COLOURS,
    TINT_HUES_DEGREES,
    ObjectFact,
    Relation,
    SceneFacts,
)
from captionserve_server.demo.kinds import KINDS, PLURAL_KINDS, colours_of

_BACKGROUND_PATTERN = re.compile(r"^(?P<scene>.+) on an? (?P<background>\w+) background$")
_OBJECT_PATTERN = re.compile(
    rf"^(?:an? )?(?:(?P<colour>{'|'.join(TINT_HUES_DEGREES)}) )?(?P<kind>.+)$"
)


def write_caption(facts: SceneFacts) -> str:
    """Return the caption that states these facts."""
    parts = [_with_article(_object_words(facts.subject))]
    if facts.relation is not None and facts.other is not None:
        parts += [facts.relation.value, _with_article(_object_words(facts.other))]
    parts += ["on", _with_article(f"{facts.background} background")]
    return " ".join(parts)


def parse_caption(caption: str) -> SceneFacts | None:
    """Return the facts a caption states, or None if it is no caption of a demo scene.

    Model output is welcome as it is: case, spacing and a wrong article do not matter; unknown kinds
    and colours, or anything left over, do.
    """
    match = _BACKGROUND_PATTERN.match(" ".join(caption.lower().split()))
    if match is None or match["background"] not in BACKGROUND_COLOURS:
        return None
    for relation in Relation:
        first, separator, second = match["scene"].partition(f" {relation.value} ")
        if separator:
            subject, other = _parse_object(first), _parse_object(second)
            if subject is None or other is None:
                return None
            return SceneFacts(subject, match["background"], relation, other)
    single = _parse_object(match["scene"])
    return None if single is None else SceneFacts(single, match["background"])


def _object_words(fact: ObjectFact) -> str:
    return fact.kind if fact.colour is None else f"{fact.colour} {fact.kind}"


def _with_article(words: str) -> str:
    if words in PLURAL_KINDS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _parse_object(words: str) -> ObjectFact | None:
    match = _OBJECT_PATTERN.match(words)
    if match is None or match["kind"] not in KINDS:
        return None
    if match["colour"] not in colours_of(match["kind"]):
        return None
    return ObjectFact(match["kind"], match["colour"])
