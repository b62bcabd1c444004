"""Calls of an image-to-text pipeline, and what came of each, as JSON.

Imports nothing of ours: the table is also run in a process that has transformers 4.57 instead.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = ("0.png", "1.png", "2.png")
SEVERAL = {"num_beams": 4, "num_return_sequences": 2}


@dataclass(frozen=True)
class Place:
    """What the calls are about.

    Attributes:
        folder: holds IMAGES and the files that `prepare` writes.
        url: of the same folder, with a slash at its end.
    """

    folder: Path
    url: str

    def path(self, name: str) -> str:
        """A file's path as text."""
        return str(self.folder / name)

    @property
    def paths(self) -> list[str]:
        """Those of all images."""
        return [self.path(name) for name in IMAGES]

    def picture(self, name: str) -> Image.Image:
        """An image as Pillow has it in memory."""
        with Image.open(self.folder / name) as image:
            picture: Image.Image = image.convert("RGB")
            return picture

    def base64(self, name: str) -> str:
        """A file's content as text."""
        return base64.b64encode((self.folder / name).read_bytes()).decode()


def prepare(folder: Path) -> None:
    """Write the files beside IMAGES that the calls name."""
    first = (folder / IMAGES[0]).read_bytes()
    (folder / "cut.png").write_bytes(first[: len(first) // 2])
    (folder / "text.txt").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "turned").mkdir()
    picture = Image.open(io.BytesIO(first)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    picture.convert("L").save(folder / "grey.png")
    picture.quantize(64).save(folder / "palette.gif")


def torch_dataset(items: list[Any]) -> Any:
    """A map-style dataset."""
    from torch.utils.data import Dataset

    class Items(Dataset[Any]):
        """Its items by their place."""

        def __len__(self) -> int:
            """How many there are."""
            return len(items)

        def __getitem__(self, place: int) -> Any:
            """The item at a place."""
            return items[place]

    return Items()


def torch_stream(items: list[Any]) -> Any:
    """A dataset without length."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[Any]):
        """Its items in turn."""

        def __iter__(self) -> Iterator[Any]:
            """From the first."""
            return iter(items)

    return Stream()


def results_before_the_error(iterable: Any) -> Any:
    """What an iteration gives until it raises, and the names of the error's types."""
    given = []
    try:
        given.extend(iterable)
    except Exception as error:
        return [given, type_names(error)]
    return [given, []]


def type_names(error: BaseException) -> list[str]:
    """An error's type and those it is one of."""
    return [each.__name__ for each in type(error).__mro__]


Call = Callable[[Any, Place], Any]

# Inputs of every kind, and how they come back.
INPUTS: dict[str, Call] = {
    "path": lambda pipe, at: pipe(at.path("0.png")),
    "by name": lambda pipe, at: pipe(inputs=at.path("1.png")),
    "old name": lambda pipe, at: pipe(None, images=at.path("1.png")),
    "picture": lambda pipe, at: pipe(at.picture("2.png")),
    "opened picture": lambda pipe, at: pipe(Image.open(at.path("2.png"))),
    "URL": lambda pipe, at: pipe(at.url + "1.png"),
    "data URI": lambda pipe, at: pipe("data:image/png;base64," + at.base64("1.png")),
    "base64": lambda pipe, at: pipe(at.base64("2.png")),
    "base64 in lines": lambda pipe, at: pipe(
        base64.encodebytes(Path(at.path("2.png")).read_bytes()).decode()
    ),
    "turned by EXIF": lambda pipe, at: pipe(at.path("turned.jpg")),
    "grey": lambda pipe, at: pipe(at.path("grey.png")),
    "palette": lambda pipe, at: pipe(at.path("palette.gif")),
    "list": lambda pipe, at: pipe(at.paths),
    "list of one": lambda pipe, at: pipe(at.paths[:1]),
    "list of all kinds": lambda pipe, at: pipe(
        [at.path("0.png"), at.picture("1.png"), at.url + "2.png", at.base64("0.png")]
    ),
    "no images": lambda pipe, at: pipe([]),
    "generator": lambda pipe, at: list(pipe(path for path in at.paths)),
    "no images of a generator": lambda pipe, at: list(pipe(path for path in at.paths[:0])),
    "generator, one after the other": lambda pipe, at: [
        next(each) for each in [iter(pipe(path for path in at.paths))] for _ in IMAGES
    ],
    "dataset": lambda pipe, at: list(pipe(torch_dataset(at.paths))),
    "length of a dataset": lambda pipe, at: len(pipe(torch_dataset(at.paths))),
    "dataset, twice": lambda pipe, at: [
        list(each) for each in [pipe(torch_dataset(at.paths[:2]))] for _ in range(2)
    ],
    "stream": lambda pipe, at: list(pipe(torch_stream(at.paths))),
}

# Keywords; each of the texts is compared as well.
KEYWORDS: dict[str, Call] = {
    "greedy": lambda pipe, at: pipe(at.paths, generate_kwargs={"num_beams": 1}),
    "beams": lambda pipe, at: pipe(at.paths, generate_kwargs={"num_beams": 3}),
    "several sequences": lambda pipe, at: pipe(at.path("0.png"), generate_kwargs=SEVERAL),
    "several sequences of a list": lambda pipe, at: pipe(at.paths, generate_kwargs=SEVERAL),
    "several sequences of a generator": lambda pipe, at: list(
        pipe((path for path in at.paths), generate_kwargs=SEVERAL)
    ),
    "max_new_tokens": lambda pipe, at: pipe(at.paths, max_new_tokens=3),
    "max_new_tokens of generate": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"max_new_tokens": 4, "num_beams": 1}
    ),
    "max_length": lambda pipe, at: pipe(at.paths, generate_kwargs={"max_length": 4}),
    "both lengths": lambda pipe, at: pipe(
        at.paths, max_new_tokens=5, generate_kwargs={"max_length": 3}
    ),
    "least lengths": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"min_new_tokens": 12, "min_length": 3}
    ),
    "length_penalty": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"num_beams": 4, "length_penalty": -2.0, "early_stopping": True}
    ),
    "never stopping early": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"early_stopping": "never", "num_beams": 2}
    ),
    "repetitions": lambda pipe, at: pipe(
        at.paths,
        generate_kwargs={"num_beams": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ),
    "suppress_tokens": lambda pipe, at: pipe(at.paths, generate_kwargs={"suppress_tokens": [5, 9]}),
    "sampling of one token": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"num_beams": 1, "do_sample": True, "top_k": 1}
    ),
    "temperature without sampling": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"temperature": 0.5, "top_p": 0.9, "do_sample": False}
    ),
    "top_k without a word of sampling": lambda pipe, at: pipe(
        at.paths, generate_kwargs={"top_k": 3, "num_beams": 1}
    ),
    "use_cache": lambda pipe, at: pipe(at.paths, generate_kwargs={"use_cache": False}),
    "none of them set": lambda pipe, at: pipe(
        at.paths, max_new_tokens=None, generate_kwargs=None, timeout=None, prompt=None
    ),
    "empty": lambda pipe, at: pipe(at.paths, generate_kwargs={}),
    "batch_size": lambda pipe, at: pipe(at.paths, batch_size=2),
    "batch_size of a generator": lambda pipe, at: list(
        pipe((path for path in at.paths), batch_size=2)
    ),
    "num_workers": lambda pipe, at: pipe(at.paths, num_workers=2),
    "timeout": lambda pipe, at: pipe(at.url + "0.png", timeout=10),
}

# What is refused, with the type of the error.
REFUSALS: dict[str, Call] = {
    "nothing": lambda pipe, at: pipe(),
    "None": lambda pipe, at: pipe(None),
    "two arguments": lambda pipe, at: pipe(at.path("0.png"), 3),
    "unknown keyword": lambda pipe, at: pipe(at.path("0.png"), num_beams=4),
    "unknown keyword of a generator": lambda pipe, at: pipe((p for p in at.paths), num_beams=4),
    "unknown option": lambda pipe, at: pipe(at.path("0.png"), generate_kwargs={"beams": 4}),
    "options that are no mapping": lambda pipe, at: pipe(at.path("0.png"), generate_kwargs=4),
    "max_new_tokens twice": lambda pipe, at: pipe(
        at.paths, max_new_tokens=3, generate_kwargs={"max_new_tokens": 3}
    ),
    "more sequences than beams": lambda pipe, at: pipe(
        at.path("0.png"), generate_kwargs={"num_beams": 2, "num_return_sequences": 3}
    ),
    "no tokens": lambda pipe, at: pipe(at.path("0.png"), max_new_tokens=0),
    "fewer than no tokens": lambda pipe, at: pipe(at.path("0.png"), max_new_tokens=-1),
    "no temperature": lambda pipe, at: pipe(
        at.path("0.png"), generate_kwargs={"do_sample": True, "temperature": 0.0}
    ),
    "prompt": lambda pipe, at: pipe(at.path("0.png"), prompt="a photo of"),
    "prompt that is no text": lambda pipe, at: pipe(at.path("0.png"), prompt=3),
    "prompt of a list": lambda pipe, at: pipe(at.paths, prompt="a photo of"),
    "no batch": lambda pipe, at: pipe(at.paths, batch_size=0),
    "fewer than no workers": lambda pipe, at: pipe(at.paths, num_workers=-1),
    "missing file": lambda pipe, at: pipe(at.path("missing.png")),
    "folder": lambda pipe, at: pipe(at.path("turned")),
    "text": lambda pipe, at: pipe("a cat"),
    "no text": lambda pipe, at: pipe(""),
    "NUL": lambda pipe, at: pipe("a\0b"),
    "base64 of no image": lambda pipe, at: pipe(at.base64("text.txt") * 200),
    "data URI of no image": lambda pipe, at: pipe("data:image/png;base64," + at.base64("text.txt")),
    "data URI of another kind": lambda pipe, at: pipe("data:text/plain,hello"),
    "letters beyond ASCII": lambda pipe, at: pipe("é" * 300),
    "file of no image": lambda pipe, at: pipe(at.path("text.txt")),
    "empty file": lambda pipe, at: pipe(at.path("empty.png")),
    "cut file": lambda pipe, at: pipe(at.path("cut.png")),
    "cut base64": lambda pipe, at: pipe(at.base64("cut.png")),
    "URL of no image": lambda pipe, at: pipe(at.url + "text.txt"),
    "URL of nothing": lambda pipe, at: pipe(at.url + "missing.png"),
    "URL where nobody listens": lambda pipe, at: pipe("http://127.0.0.1:9/0.png"),
    "number": lambda pipe, at: pipe(4),
    "bytes": lambda pipe, at: pipe(Path(at.path("0.png")).read_bytes()),
    "Path": lambda pipe, at: pipe(Path(at.path("0.png"))),
    "tuple": lambda pipe, at: pipe(tuple(at.paths)),
    "dict": lambda pipe, at: pipe({"image": at.path("0.png")}),
    "iterator": lambda pipe, at: pipe(iter(at.paths)),
    "list in a list": lambda pipe, at: pipe([at.paths]),
    "None in a list": lambda pipe, at: pipe([at.path("0.png"), None]),
    "missing file in a list": lambda pipe, at: pipe([at.path("0.png"), at.path("missing.png")]),
}

# Results up to an error, and then it.
HALVES: dict[str, Call] = {
    "missing file of a generator": lambda pipe, at: results_before_the_error(
        pipe(path for path in [*at.paths[:2], at.path("missing.png"), at.path("0.png")])
    ),
    "cut file of a dataset": lambda pipe, at: results_before_the_error(
        pipe(torch_dataset([at.path("1.png"), at.path("cut.png"), at.path("0.png")]))
    ),
    "generator that raises": lambda pipe, at: results_before_the_error(
        pipe(at.paths[place] for place in (0, 1, 9))
    ),
    "unknown option of a generator": lambda pipe, at: results_before_the_error(
        pipe((path for path in at.paths), generate_kwargs={"beams": 4})
    ),
    "prompt of a generator": lambda pipe, at: results_before_the_error(
        pipe((path for path in at.paths), prompt="a photo of")
    ),
}

# Where theirs is wrong: several sequences in batches mix the rows of different images.
MIXED_UP: dict[str, Call] = {
    "several sequences in batches": lambda pipe, at: pipe(
        at.paths, batch_size=3, generate_kwargs=SEVERAL
    ),
}

CALLS = INPUTS | KEYWORDS | REFUSALS | HALVES | MIXED_UP


def outcomes(pipe: Any, place: Place) -> dict[str, Any]:
    """What comes of each call: {"result": ...}, or {"error": names of its types}."""
    found: dict[str, Any] = {}
    for name, call in CALLS.items():
        try:
            found[name] = {"result": call(pipe, place)}
        except Exception as error:
            found[name] = {"error": type_names(error), "said": str(error)[:200]}
    return found


def main() -> None:
    """Run the table with transformers: its packages, a checkpoint, the folder and its URL."""
    packages, checkpoint, folder, url = sys.argv[1:]
    sys.path.insert(0, packages)
    import transformers
    from transformers import pipeline

    # The factory has more overloads than a type checker can tell apart.
    made: Any = pipeline
    pipe = made("image-to-text", model=checkpoint, device="cpu")
    found = outcomes(pipe, Place(Path(folder), url))
    json.dump({"version": transformers.__version__, "outcomes": found}, sys.stdout)


if __name__ == "__main__":
    main()
