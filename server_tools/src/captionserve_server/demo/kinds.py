"""Which emoji the demo scenes show: one table from kind and colour to a Unicode code point.

Kinds carry their Unicode (CLDR) short names in lower case. A kind either has no colour of its own,
comes in colours (a code point for each), or is one code point tinted in every colour.
"""

from __future__ import annotations

from captionserve_server.demo.facts import TINT_HUES_DEGREES, ObjectFact

PLAIN_KINDS: dict[str, str] = {
    "dog face": "1f436",
    "cat face": "1f431",
    "rabbit face": "1f430",
    "fox": "1f98a",
    "panda": "1f43c",
    "tiger face": "1f42f",
    "lion": "1f981",
    "cow face": "1f42e",
    "pig face": "1f437",
    "frog": "1f438",
    "penguin": "1f427",
    "owl": "1f989",
    "butterfly": "1f98b",
    "snail": "1f40c",
    "octopus": "1f419",
    "turtle": "1f422",
    "tropical fish": "1f420",
    "elephant": "1f418",
    "crab": "1f980",
    "banana": "1f34c",
    "grapes": "1f347",
    "watermelon": "1f349",
    "strawberry": "1f353",
    "pineapple": "1f34d",
    "cherries": "1f352",
    "carrot": "1f955",
    "pizza": "1f355",
    "hamburger": "1f354",
    "doughnut": "1f369",
    "mushroom": "1f344",
    "bus": "1f68c",
    "bicycle": "1f6b2",
    "airplane": "2708-fe0f",
    "rocket": "1f680",
    "sailboat": "26f5",
    "tractor": "1f69c",
    "guitar": "1f3b8",
    "key": "1f511",
    "soccer ball": "26bd",
    "alarm clock": "23f0",
    "teddy bear": "1f9f8",
    "light bulb": "1f4a1",
    "crown": "1f451",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "house": "1f3e0",
}

COLOURED_KINDS: dict[str, dict[str, str]] = {
    "apple": {"red": "1f34e", "green": "1f34f"},
    "book": {"red": "1f4d5", "orange": "1f4d9", "green": "1f4d7", "blue": "1f4d8"},
    "heart": {
        "red": "2764-fe0f",
        "orange": "1f9e1",
        "yellow": "1f49b",
        "green": "1f49a",
        "blue": "1f499",
        "purple": "1f49c",
    },
    "circle": {
        "red": "1f534",
        "orange": "1f7e0",
        "yellow": "1f7e1",
        "green": "1f7e2",
        "blue": "1f535",
        "purple": "1f7e3",
    },
}

TINTED_KINDS: dict[str, str] = {
    "automobile": "1f697",
    "balloon": "1f388",
}

# Kinds whose name takes no article.
PLURAL_KINDS = frozenset({"grapes", "cherries"})


def all_code_points() -> tuple[str, ...]:
    """Every code point whose art is needed, sorted."""
    coloured = {code for by_colour in COLOURED_KINDS.values() for code in by_colour.values()}
    return tuple(sorted({*PLAIN_KINDS.values(), *coloured, *TINTED_KINDS.values()}))


def colours_of(kind: str) -> tuple[str | None, ...]:
    """The colours a kind comes in; `(None,)` if captions name none for it."""
    if kind in COLOURED_KINDS:
        return tuple(COLOURED_KINDS[kind])
    if kind in TINTED_KINDS:
        return tuple(TINT_HUES_DEGREES)
    return (None,)


def code_point_of(fact: ObjectFact) -> str:
    """The code point whose art shows this object (before tinting)."""
    if fact.kind in COLOURED_KINDS and fact.colour is not None:
        return COLOURED_KINDS[fact.kind][fact.colour]
    return TINTED_KINDS.get(fact.kind) or PLAIN_KINDS[fact.kind]


KINDS: tuple[str, ...] = (*PLAIN_KINDS, *COLOURED_KINDS, *TINTED_KINDS)
