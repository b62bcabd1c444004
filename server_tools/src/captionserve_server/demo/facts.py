"""The facts a demo scene is made of: what is shown, in which colour, where, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Relation(str, Enum):
    """Where the subject lies as seen from the other object; the value is its wording."""

    LEFT_OF = "to the left of"
    RIGHT_OF = "to the right of"
    ABOVE = "above"
    BELOW = "below"


@dataclass(frozen=True)
class ObjectFact:
    """One object: its kind (Unicode short name) and, for kinds that come in colours, its colour."""

    kind: str
    colour: str | None = None


@dataclass(frozen=True)
class SceneFacts:
    """Everything a caption states. `relation` and `other` are both present or both absent.

    With two objects the subject is always the clearly larger one, so that every scene has exactly
    one true caption.
    """

    subject: ObjectFact
    background: str
    relation: Relation | None = None
    other: ObjectFact | None = None

    def __post_init__(self) -> None:
        """Refuse a relation without an object, and the reverse."""
        if (self.relation is None) != (self.other is None):
            raise ValueError("relation and other must be given together")

    @property
    def objects(self) -> tuple[ObjectFact, ...]:
        """The subject, then the other object if there is one."""
        return (self.subject,) if self.other is None else (self.subject, self.other)


# RGB centres, 0..255; shades vary around them (see scenes.py).
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "gray": (132, 134, 136),
    "black": (18, 18, 20),
    "red": (190, 28, 36),
    "yellow": (238, 206, 52),
    "green": (40, 140, 60),
    "blue": (40, 84, 190),
    "purple": (120, 54, 160),
}

# Degrees on the colour circle, for kinds that are tinted.
TINT_HUES_DEGREES: dict[str, float] = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 52.0,
    "green": 125.0,
    "blue": 218.0,
    "purple": 280.0,
}
