"""Image files of all accepted formats, damaged at random."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

from PIL import Image

from tests.reference import picture

_KINDS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    (
        "JPEG",
        "CMYK",
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\3\0\1\0\0\0\6\0\0\0\0\0\0\0"},
    ),
    ("PNG", "RGB", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGBA", {}),
    ("PNG", "I;16", {}),
    ("PNG", "1", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("GIF", "P", {"comment": b"a comment"}),
    ("PPM", "RGB", {}),
    ("PPM", "L", {}),
    ("PPM", "1", {}),
)


def damaged_files(count: int, seed: int) -> Iterator[bytes]:
    """Files of all kinds in turn, each damaged in one to four places."""
    chance = random.Random(seed)
    files = [_file(*kind) for kind in _KINDS]
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(chance.randint(1, 4)):
            _damage(data, chance)
        yield bytes(data)


def _file(kind: str, mode: str, how: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image = picture(1).resize((80, 60))
    if mode == "I;16":
        image = Image.new("I;16", image.size, 30_000)
    image.convert(mode).save(file, kind, **how)
    return file.getvalue()


def _damage(data: bytearray, chance: random.Random) -> None:
    if not data:
        return
    # Headers say more than pixels: half of the damage is there.
    place = chance.randrange(min(len(data), 64) if chance.random() < 0.5 else len(data))
    length = chance.randint(1, 8)
    way = chance.randrange(5)
    if way == 0:
        data[place] ^= 1 << chance.randrange(8)
    elif way == 1:
        data[place : place + length] = chance.randbytes(length)
    elif way == 2:
        del data[place : place + length]
    elif way == 3:
        data[place:place] = data[place : place + length]
    elif chance.random() < 0.3:
        del data[place:]
    else:
        data[place : place + 4] = chance.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\x20\0"])
