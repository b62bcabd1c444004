"""Who captions: one service or several that share the work, or a model repository here."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from captionserve import CaptionClient, CaptionResult, Framing, GenerationOptions, Outcome

if TYPE_CHECKING:
    from captionserve_server.local import LocalCaptioner

Outcomes = Generator[Outcome, None, None]


class DifferentModelsError(ValueError):
    """Services that share the work do not serve the same model."""


class Captioner(Protocol):
    """Captions images as they come."""

    def model(self) -> dict[str, object]:
        """What captions, as JSON values: the same for the same captions.

        Raises:
            CaptionError: if nobody answers.
        """

    def outcomes(self, images: Iterable[bytes], options: GenerationOptions) -> Outcomes:
        """What becomes of each image, as soon as it is known; pulls images as there is room.

        Raises:
            CaptionError: if no image can be captioned, such as with a token that is not known.
        """


class Service:
    """A running service."""

    def __init__(self, client: CaptionClient, framing: Framing | None = None) -> None:
        """Ask by this client, whose timeout is that of each image, for what is in the framing."""
        self._client = client
        self._framing = framing or Framing()

    def model(self) -> dict[str, object]:
        """The version that is asked when none is named."""
        served = next(each for each in self._client.models().models if each.is_default)
        described = dataclasses.asdict(served)
        del described["is_default"]
        return described

    def outcomes(self, images: Iterable[bytes], options: GenerationOptions) -> Outcomes:
        """By CaptionMany, with the window that the service wants."""
        return self._client.caption_many(images, options, ordered=False, **self._framing)


class Local:
    """A model in this process."""

    def __init__(self, captioner: LocalCaptioner, framing: Framing | None = None) -> None:
        """Caption with this one, as the framing says."""
        self._captioner = captioner
        self._framing = framing or Framing()

    def model(self) -> dict[str, object]:
        """The version that was loaded."""
        return self._captioner.model()

    def outcomes(self, images: Iterable[bytes], options: GenerationOptions) -> Outcomes:
        """By the engine, as many at once as it has slots."""
        # ONNX Runtime takes a while to import, and a service does not need it.
        from captionserve_server.bulk.local_outcomes import local_outcomes

        outcomes = local_outcomes(self._captioner, images, options, self._framing)
        for index, found in enumerate(outcomes):
            if isinstance(found, CaptionResult):
                yield Outcome(index, found, None)
            else:
                yield Outcome(index, None, found)


def common_model(captioners: Sequence[Captioner]) -> dict[str, object]:
    """What all of them caption with.

    Raises:
        DifferentModelsError: if that is not the same.
        CaptionError: if one of them does not answer.
    """
    model, *others = (captioner.model() for captioner in captioners)
    for other in others:
        differing = sorted(name for name in model if model[name] != other.get(name))
        if differing:
            raise DifferentModelsError(
                f"the services differ in their model's {', '.join(differing)}"
            )
    return model
