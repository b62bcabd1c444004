"""The captioner in this process: the service's own core and graphs, without its server.

An image is prepared by the thread that asks, several by a thread that is ahead of it; the engine's
thread encodes and decodes those of all askers together.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from captionserve_server.core.beams import BeamHistory, BeamStep
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.decode_budget import (
    BYTES_PER_MEGABYTE,
    DEFAULT_DECODE_MEGABYTES,
    DecodeBudget,
)
from captionserve_server.core.engine.engine_thread import Answer, EngineThread
from captionserve_server.core.engine.scheduler import Scheduler, SchedulerLimits
from captionserve_server.core.engine.timeline import Stage, Timeline
from captionserve_server.core.engine.worker import Worker
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.core.framing import Framing, NamedFraming
from captionserve_server.core.image_files import Box
from captionserve_server.core.options import NamedOptions
from captionserve_server.core.results import FinishedCaption, Finisher
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import Float32Array, UInt8Array
from captionserve_server.core.updates import News, Progress, Updates
from captionserve_server.local.images import ImageInput, each_image, image_views
from captionserve_server.local.model_folder import load_model
from captionserve_server.runtime import graph_tensors
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from captionserve import AltText
    from typing_extensions import Self, Unpack

# With nlpconnect's shapes a slot in use takes 14 MB and an entry 72 KB, so that captions together
# stay below 200 MB.
DEFAULT_LIMITS = SchedulerLimits(slots=8, max_rows=32, max_entries=1024, max_admissions=2)
# Images prepared and not yet handed out, for each slot: enough that none is empty while a caption
# takes longer than those behind it.
_IMAGES_AHEAD = 2
# A step of a large model may take a second or two.
_CLOSE_SECONDS = 30.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalRegion:
    """The captions of a part of an image.

    Attributes:
        box: left, top, right and bottom, in pixels of the upright image.
        captions: as those of an image of its own, best first.
    """

    box: Box
    captions: tuple[FinishedCaption, ...]

    @property
    def text(self) -> str:
        """The best caption's text."""
        return self.captions[0].text


@dataclass(frozen=True)
class LocalResult:
    """The captions of one image.

    Attributes:
        captions: of the whole image; at least one, best first.
        model_version: the version of the model that made them.
        regions: the parts that were asked for: the regions, then the tiles row by row.
        beams: what the search considered; None unless output_beams was set.
        stages: how long each stage took, in their order; empty unless output_stages was set.
    """

    captions: tuple[FinishedCaption, ...]
    model_version: int
    regions: tuple[LocalRegion, ...] = ()
    beams: BeamHistory | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def text(self) -> str:
        """The best caption's text."""
        return self.captions[0].text

    def alt_text(
        self,
        max_chars: int = 125,
        nearby_text: str | None = None,
        file_name: str | os.PathLike[str] | None = None,
        hedge_below: float = 0.5,
    ) -> AltText:
        """A draft of an alternative text; as `alt_text` of the client's CaptionResult.

        Raises:
            ImportError: if the client, `captionserve`, is not installed.
        """
        try:
            from captionserve._alt_text import alt_text_of
        except ImportError as error:
            raise ImportError("alt text needs the client too: pip install captionserve") from error
        return alt_text_of(self.captions[0], max_chars, nearby_text, file_name, hedge_below)


@dataclass(frozen=True)
class LocalUpdate:
    """What has become known of a caption that is being decoded.

    Attributes:
        text: the text that follows that of the last update; all of them together are the caption.
        token_ids: its tokens.
        result: the whole result; only in the last update, which has nothing else.
        beam_steps: the steps of the search since the last update; all of them together are those of
            result.beams. Empty unless output_beams was set.
    """

    text: str
    token_ids: tuple[int, ...]
    result: LocalResult | None
    beam_steps: tuple[BeamStep, ...] = ()


Outcome = LocalResult | CaptionServeError | OSError
"""What becomes of one image of several: its captions, or why there are none."""


class NamedArguments(NamedOptions, NamedFraming, total=False):
    """What is asked of an image, by name."""


@dataclass(frozen=True)
class _Asked:
    """What is asked of each image of a call.

    Attributes:
        plan: how to decode.
        framing: which parts of it are captioned beside the whole, and how they are resized.
    """

    plan: CaptionPlan
    framing: Framing


class LocalCaptioner:
    """Captions images in this process; several threads may use it at once.

    With `with`, or with `close`, its thread ends and its memory is given back; else both stay until
    the process ends.
    """

    def __init__(
        self,
        bundle_dir: str | os.PathLike[str],
        *,
        version: int | None = None,
        threads: int = 0,
        limits: SchedulerLimits = DEFAULT_LIMITS,
        decode_megabytes: int = DEFAULT_DECODE_MEGABYTES,
    ) -> None:
        """Load a model.

        Args:
            bundle_dir: a model repository, as `captionserve export` writes it.
            version: which of its versions; None for the newest.
            threads: of ONNX Runtime; 0 is one per core.
            limits: what captions that are decoded together may take; each slot takes memory when
                it is first used.
            decode_megabytes: memory of all images that several threads decode at once; one that
                takes more is decoded alone.

        Raises:
            ModelFolderError: if something in the folder is missing or damaged; names it.
            ValueError: if threads is below 0, or one of the limits below 1.
        """
        if threads < 0:
            raise ValueError(f"threads must be 0 or more, is {threads}")
        limits.check()
        model = load_model(Path(bundle_dir), version=version, threads=threads)
        self._model = model
        self._budget = DecodeBudget(decode_megabytes * BYTES_PER_MEGABYTE)
        self._images_ahead = _IMAGES_AHEAD * limits.slots
        self._finisher = Finisher(model.bundle, model.tokenizer.decode)
        scheduler = Scheduler(
            _Encoder(model.encoder),
            GraphStepModel(model.decoder, model.bundle.geometry, limits.slots),
            Vocabulary(model.bundle.special, model.bundle.geometry.vocabulary_size),
            limits,
        )
        self._engine = EngineThread(scheduler, _logger.error)

    @property
    def model_version(self) -> int:
        """The version that was loaded."""
        return self._model.version

    def model(self) -> dict[str, object]:
        """What was loaded, as JSON values: version, precision, image_size, and the defaults."""
        return {
            "version": self._model.version,
            "precision": self._model.bundle.precision,
            "image_size": self._model.preprocessor.output_size(),
            "defaults": self._model.bundle.defaults.as_given(),
        }

    def caption(
        self,
        image: ImageInput,
        options: DataclassInstance | None = None,
        **named: Unpack[NamedArguments],
    ) -> LocalResult:
        """Caption one image.

        Args:
            image: a path, an encoded image, a binary file object, a PIL image, a uint8 RGB array of
                shape (height, width, 3), or a float array or torch tensor of shape
                (3, height, width) as the checkpoint's own image processor makes it.
            options: a dataclass with the decoding options' names, such as the client's
                GenerationOptions; None, also of a single option, is the checkpoint's default.
            **named: decoding options by name; these come before those of `options`. And what is
                asked of the image: `regions`, parts to be captioned beside the whole, each (left,
                top, right, bottom) in pixels of the upright image; `tiles`, (rows, columns) of a
                grid whose cells are, too; `resize`, "checkpoint", "center_crop" or "letterbox".

        Raises:
            CaptionServeError: as the service would answer; see core/errors.py.
            OSError: if a file cannot be read.
            TypeError: if the image has the wrong type.
            ValueError: if an array or a PIL image has a wrong form.
        """
        asked = self._asked(options, named)
        return self._result(self._begin(image, asked), asked)

    def caption_stream(
        self,
        image: ImageInput,
        options: DataclassInstance | None = None,
        **named: Unpack[NamedArguments],
    ) -> LocalStream:
        """Caption one image and give the words as they become certain, at last the result.

        Args:
            image: as for `caption`; it is prepared before this returns.
            options: likewise.
            **named: likewise.

        Returns:
            the updates, an iterator, which raises what `caption` raises. Closing it, or parting
            with it, ends the work.

        Raises:
            InvalidOptionsError: if the options are wrong.
            InvalidFramingError: if no image has such parts.
            TypeError: if the image has the wrong type.
            ValueError: if an array or a PIL image has a wrong form.
        """
        asked = self._asked(options, named)
        updates = self._finisher.updates(asked.plan)
        begun = self._begin(image, asked, updates)
        return LocalStream(begun, updates, lambda: self._result(begun, asked))

    def caption_all(
        self,
        images: Iterable[ImageInput],
        options: DataclassInstance | None = None,
        **named: Unpack[NamedArguments],
    ) -> list[LocalResult]:
        """Caption several images together.

        Args:
            images: as `caption` takes them, or a float array of shape (images, 3, height, width),
                which is so many of them; each is read and prepared when its turn comes.
            options: as for `caption`, the same for all images.
            **named: likewise.

        Returns:
            results in the order of the images.

        Raises:
            CaptionServeError: as `caption`, and likewise the others; of the first image that fails.
        """
        results: list[LocalResult] = []
        for outcome in self.caption_each(images, options, **named):
            if isinstance(outcome, Exception):
                raise outcome
            results.append(outcome)
        return results

    def caption_each(
        self,
        images: Iterable[ImageInput],
        options: DataclassInstance | None = None,
        **named: Unpack[NamedArguments],
    ) -> Iterator[Outcome]:
        """Caption several images together, of which some may fail.

        Args:
            images: as for `caption_all`; iterated by a thread of its own, a few images ahead, so
                that what is known need not wait for an image that is still to come.
            options: likewise.
            **named: likewise.

        Returns:
            what becomes of each image, in their order, as soon as it is known.

        Raises:
            InvalidOptionsError: if the options are wrong, before any image is read.
            InvalidFramingError: likewise, if no image has such parts.
            TypeError: if an image has the wrong type.
            ValueError: if an array or a PIL image has a wrong form.
        """
        return self._outcomes(images, self._asked(options, named))

    def close(self) -> None:
        """End the engine's thread; captions under way, and later ones, fail."""
        self._engine.close(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        """Use it until the end of the block."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _asked(self, options: DataclassInstance | None, named: NamedArguments) -> _Asked:
        own = () if options is None else fields(options)
        given: dict[str, object] = {each.name: getattr(options, each.name) for each in own}
        by_name: dict[str, Any] = dict(named)
        framing = Framing.of(
            **{name: by_name.pop(name, None) for name in NamedFraming.__annotations__}
        )
        # What is None is not set, and hides no value of the dataclass.
        given |= {name: value for name, value in by_name.items() if value is not None}
        return _Asked(self._model.bundle.plan(given, self._model.tokenizer.encode), framing)

    def _begin(self, image: ImageInput, asked: _Asked, updates: Updates | None = None) -> _Begun:
        """Prepare an image and queue it; what its caller did not get wrong is told later."""
        begun = _Begun(updates)
        try:
            views = image_views(
                image, self._model.preprocessor, self._budget.reserved, asked.framing
            )
            begun.boxes = views.boxes
            begun.timeline.passed("preprocess")
            self._engine.submit(views.pixels, asked.plan, begun, begun.timeline)
        except (CaptionServeError, OSError) as error:
            begun.fail(error)
        return begun

    def _result(self, begun: _Begun, asked: _Asked) -> LocalResult:
        """Wait for the captions; raises what `caption` raises."""
        try:
            answer = begun.captions.result()
        finally:
            begun.has_gone = True
        whole, *parts = (
            tuple(self._finisher.finished(caption, asked.plan) for caption in captions)
            for captions in answer
        )
        return LocalResult(
            whole,
            self.model_version,
            regions=tuple(map(LocalRegion, begun.boxes, parts)),
            beams=self._finisher.beams(answer[0]),
            stages=tuple(begun.timeline.stages) if asked.plan.options.output_stages else (),
        )

    def _outcomes(self, images: Iterable[ImageInput], asked: _Asked) -> Iterator[Outcome]:
        ahead = _Ahead(images, lambda image: self._begin(image, asked), self._images_ahead)
        try:
            while (begun := ahead.next()) is not None:
                yield self._outcome(begun, asked)
        finally:
            ahead.close()

    def _outcome(self, begun: _Begun, asked: _Asked) -> Outcome:
        try:
            return self._result(begun, asked)
        except (CaptionServeError, OSError) as error:
            return error


@dataclass
class _Begun:
    """An image that is being captioned, and whoever waits for it: the engine's Caller.

    Attributes:
        updates: what is told while it is decoded, where that is wanted.
        captions: what will come of it: those of the whole image, and of each of its parts.
        news: what is new of it, where that is wanted; None where no more comes.
        boxes: where the parts are.
        has_gone: whether nobody waits any more, so that the engine lets go of it.
        deadline: never.
        timeline: how long its stages took, until the captions are there.
    """

    updates: Updates | None = None
    captions: Future[list[list[DecodedCaption]]] = field(default_factory=Future)
    news: queue.SimpleQueue[News | None] = field(default_factory=queue.SimpleQueue)
    boxes: Sequence[Box] = ()
    has_gone: bool = False
    deadline: float = math.inf
    timeline: Timeline = field(default_factory=Timeline)

    def hear(self, progress: Progress) -> None:
        """Hand over what is new, where it is wanted."""
        news = None if self.updates is None else self.updates.news(progress)
        if news is not None:
            self.news.put(news)

    def end(self, answer: Answer) -> None:
        """Hand the captions over, or why there are none."""
        self.timeline.passed("steps")
        if isinstance(answer, CaptionServeError):
            self.fail(answer)
            return
        if self.updates is not None:
            self.news.put(self.updates.last_news(answer[0][0]))
        self.captions.set_result(answer)
        self.news.put(None)

    def fail(self, error: CaptionServeError | OSError) -> None:
        """Say why there are no captions."""
        self.captions.set_exception(error)
        self.news.put(None)


class LocalStream(Iterator[LocalUpdate]):
    """The updates of one caption; `close`, which any thread may call, ends the work."""

    def __init__(self, begun: _Begun, updates: Updates, result: Callable[[], LocalResult]) -> None:
        """Follow a caption.

        Args:
            begun: the image.
            updates: what is told of it.
            result: waits for its captions.
        """
        self._begun = begun
        self._updates = updates
        self._result = result
        self._ended = False

    def __next__(self) -> LocalUpdate:
        """Wait for the next update; the last has the result.

        Raises:
            CancelledError: if it is closed meanwhile.
        """
        while not self._ended:
            news = self._begun.news.get()
            if news is None:
                self._ended = True
                return LocalUpdate("", (), self._result())
            update = self._updates.update(news)
            if update is not None:
                return LocalUpdate(update.text, update.token_ids, None, update.beam_steps)
        raise StopIteration

    def close(self) -> None:
        """Give no more updates, and let go of the caption if it is not complete."""
        self._ended = True
        self._begun.has_gone = True

    def __del__(self) -> None:
        """Whoever drops it does not want the rest."""
        self.close()


@dataclass(frozen=True)
class _End:
    """No image follows.

    Attributes:
        error: what ended them; None where there are just no more.
    """

    error: BaseException | None = None


class _Ahead:
    """Pulls images and begins with them, in a thread of its own, so many ahead of the results."""

    def __init__(
        self, images: Iterable[ImageInput], begin: Callable[[ImageInput], _Begun], most: int
    ) -> None:
        """Start the thread.

        Args:
            images: pulled by the thread.
            begin: what is done with each.
            most: images begun with whose results have not been dealt with.
        """
        self._images = images
        self._begin = begin
        self._room = threading.Semaphore(most)
        self._begun: queue.SimpleQueue[_Begun | _End] = queue.SimpleQueue()
        self._waits_for_room = False
        self._closing = False
        self._worker = Worker("images-ahead", self._run, lambda error: self._begun.put(_End(error)))

    def next(self) -> _Begun | None:
        """The next image's; None after the last. The one before has been dealt with.

        Raises:
            BaseException: what pulling or beginning raised, after those before it.
        """
        if self._waits_for_room:
            self._room.release()
        self._waits_for_room = True
        begun = self._begun.get()
        if isinstance(begun, _Begun):
            return begun
        if begun.error is not None:
            raise begun.error
        return None

    def close(self) -> None:
        """Begin with no more, and let go of those whose results nobody has asked for."""
        self._closing = True
        self._room.release()
        # Not waited for: it may be waiting for an image that never comes.
        self._let_go()

    def _run(self) -> None:
        images = each_image(self._images)
        while self._has_room():
            try:
                image = next(images)
            except StopIteration:
                break
            if not self._closing:
                self._begun.put(self._begin(image))
        self._begun.put(_End())
        if self._closing:
            self._let_go()

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._closing

    def _let_go(self) -> None:
        while not self._begun.empty():
            begun = self._begun.get()
            if isinstance(begun, _Begun):
                begun.has_gone = True


class _Encoder:
    """The encoder's graph: an ImageEncoder."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """uint8 [images, 3, height, width] to float32 [images, image tokens, encoder width]."""
        states: Float32Array
        (states,) = self._graph.run({graph_tensors.PIXELS: pixels})
        return states
