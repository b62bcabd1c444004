"""Which combinations of facts training may see, and which are held out for evaluation.

Held out, whatever the art style, and decided by a hash alone:

1. every two-object scene of a held-out *pair of kinds*: if {dog face, apple} is held out, training
   never shows a dog face together with an apple, in either role, colour, relation or background;
2. every one-object scene of a held-out *(kind, colour, background)*.
"""

from __future__ import annotations

import hashlib

from captionserve_server.demo.facts import SceneFacts

HELD_OUT_PERCENT = 15
TRAINING_STYLES: tuple[str, ...] = ("noto", "twemoji")
UNSEEN_STYLE = "fluent"


def is_held_out(facts: SceneFacts) -> bool:
    """Tell whether this scene belongs to the evaluation set, so that training must not see it."""
    kinds = sorted(fact.kind for fact in facts.objects)
    if len(kinds) == 1:
        kinds += [facts.subject.colour or "", facts.background]
    digest = hashlib.blake2b("|".join(kinds).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT
