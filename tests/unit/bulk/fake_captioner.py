"""A captioner that is told what to do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterable

from captionserve import Caption, CaptionResult, FinishReason, GenerationOptions, Outcome


class StoppedError(Exception):
    """What ends a run in these tests."""


@dataclasses.dataclass
class FakeCaptioner:
    """Captions bytes with themselves; `bad` ones fail, and `most` of them end it."""

    most: int = 10**9
    version: int = 1
    seen: list[bytes] = dataclasses.field(default_factory=list)

    def model(self) -> dict[str, object]:
        return {"version": self.version, "defaults": {}}

    def outcomes(
        self, images: Iterable[bytes], options: GenerationOptions
    ) -> Generator[Outcome, None, None]:
        # Two at a time, the second first, as a service may answer.
        numbered = enumerate(images)
        while pair := list(itertools.islice(numbered, 2)):
            for index, image in reversed(pair):
                if len(self.seen) == self.most:
                    raise StoppedError
                self.seen.append(image)
                if image.startswith(b"bad"):
                    yield Outcome(index, None, OSError(5, "unreadable"))
                else:
                    yield Outcome(index, result(image.decode()), None)


def result(text: str) -> CaptionResult:
    caption = Caption(
        text=text,
        score=-1.0,
        token_ids=tuple(text.encode()),
        token_logprobs=(),
        token_texts=(),
        finish_reason=FinishReason.EOS,
        confidence=0.5,
        degenerate=False,
        attention=None,
    )
    return CaptionResult((caption,), 1, cached=False)
