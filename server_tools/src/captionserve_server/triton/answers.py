"""From what the engine tells to what callers are sent: captions as tensors, made by a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.engine.engine_thread import Answer
from captionserve_server.core.engine.timeline import Timeline
from captionserve_server.core.engine.worker import OnDeath, WorkerPool
from captionserve_server.core.errors import (
    CaptionServeError,
    ModelFaultError,
    OverloadedError,
)
from captionserve_server.core.image_files import Box
from captionserve_server.core.results import FinishedCaption, Finisher
from captionserve_server.core.updates import News, Progress, Updates
from captionserve_server.triton import wire
from captionserve_server.triton.callers import Caller
from captionserve_server.triton.pb import Array, error_response, log_error, response, text_array


class Answering:
    """The thread that makes and sends answers in their order, and the room that they give back."""

    def __init__(self, finisher: Finisher, max_requests: int, on_death: OnDeath) -> None:
        """Start the thread.

        Args:
            finisher: from decoded captions to what a caller reads.
            max_requests: requests accepted and not yet answered, each part of an image counted
                as one; more are refused.
            on_death: told of what should not have ended the thread.
        """
        self._finisher = finisher
        self._max_requests = max_requests
        self._unanswered = 0
        self._lock = threading.Lock()
        self._thread = WorkerPool("answering", 1, on_death)

    @property
    def unanswered(self) -> int:
        """Requests accepted and not yet answered, and their images' parts."""
        return self._unanswered

    def enter(self, views: int) -> None:
        """Accept a request, which `send_last` will answer; OverloadedError without room.

        Args:
            views: the pictures that it has captioned: the whole image, and its parts.
        """
        with self._lock:
            if self._unanswered + views > self._max_requests:
                raise OverloadedError("too many requests are waiting")
            self._unanswered += views

    def send_part(self, caller: Caller, updates: Updates, news: News) -> None:
        """Send what has become known, if there is anything to tell.

        Args:
            caller: who listens.
            updates: what is told of its caption.
            news: what is new of it.
        """

        def send() -> None:
            update = updates.update(news)
            if update is None:
                return
            part = {
                wire.NEW_TEXT: text_array(update.text),
                wire.NEW_TOKEN_IDS: np.array(update.token_ids, np.int32),
            }
            if update.beam_steps:
                part[wire.NEW_BEAM_STEPS] = text_array(wire.beam_steps_text(update.beam_steps))
            caller.send(response(part))

        self._thread.submit(send, _unsent)

    def send_last(self, captioning: Captioning, answer: Answer) -> None:
        """Send the captions, or why there are none, and make room for the next."""

        def send() -> None:
            try:
                if isinstance(answer, CaptionServeError):
                    last = error_response(answer)
                else:
                    last = response(self._tensors(captioning, answer))
            except Exception as error:  # A caption that cannot be told is its own caller's loss.
                last = error_response(error)
            try:
                captioning.caller.finish(last)
            finally:
                with self._lock:
                    self._unanswered -= captioning.views

        self._thread.submit(send, _unsent)

    def _tensors(
        self, captioning: Captioning, answer: Sequence[Sequence[DecodedCaption]]
    ) -> dict[wire.TensorSpec, Array]:
        """The tensors of wire.ANSWER."""
        whole, *parts = (
            [self._finisher.finished(each, captioning.plan) for each in decoded]
            for decoded in answer
        )
        tensors = caption_tensors(whole, list(zip(captioning.boxes, parts, strict=True)))
        beams = self._finisher.beams(answer[0])
        if beams is not None:
            tensors[wire.BEAMS] = text_array(wire.beams_text(beams))
        captioning.timeline.passed("answer")
        return {**tensors, wire.TIMES: np.array(captioning.timeline.numbers, np.float64)}

    def close(self, seconds: float) -> None:
        """Send what is to be sent, and end the thread, which may take so long."""
        self._thread.close(seconds)


def _unsent(error: Exception) -> None:
    log_error(f"an answer could not be sent: {type(error).__name__}: {error}")


class Captioning:
    """One request in work: what the engine calls a Caller.

    Attributes:
        caller: who asked.
        plan: how to decode.
        views: the pictures that are captioned: the whole image, and its parts.
        boxes: where the parts are, once the image's size is known.
        timeline: how long its stages took.
    """

    def __init__(
        self,
        answering: Answering,
        caller: Caller,
        plan: CaptionPlan,
        views: int,
        updates: Updates | None,
    ) -> None:
        """Begin without words.

        Args:
            answering: by which the answers go; the request has entered it with its views.
            caller: who asked.
            plan: how to decode.
            views: the pictures that are captioned.
            updates: what is told while the caption is decoded, where that is wanted.
        """
        self.caller = caller
        self.plan = plan
        self.views = views
        self.boxes: Sequence[Box] = ()
        self._answering = answering
        self._updates = updates
        self.timeline = Timeline()

    @property
    def has_gone(self) -> bool:
        """Whether the caller has gone."""
        return self.caller.has_gone

    @property
    def deadline(self) -> float:
        """The caller's deadline."""
        return self.caller.deadline

    def hear(self, progress: Progress) -> None:
        """Have what is new sent, where it is wanted."""
        if self._updates is None:
            return
        news = self._updates.news(progress)
        if news is not None:
            self._answering.send_part(self.caller, self._updates, news)

    def end(self, answer: Answer) -> None:
        """Have the last answer sent."""
        self.timeline.passed("steps")
        if self._updates is not None and not isinstance(answer, CaptionServeError):
            best = answer[0][0]
            news = self._updates.last_news(best)
            self._answering.send_part(self.caller, self._updates, news)
        self._answering.send_last(self, answer)

    def fail(self, error: Exception) -> None:
        """End with an error; one that is not of our tree is a fault, whose text is logged."""
        if not isinstance(error, CaptionServeError):
            log_error(f"a request failed: {type(error).__name__}: {error}")
            error = ModelFaultError("the model failed")
        self.end(error)


def caption_tensors(
    whole: Sequence[FinishedCaption],
    parts: Sequence[tuple[Box, Sequence[FinishedCaption]]] = (),
) -> dict[wire.TensorSpec, Array]:
    """The tensors of wire.CAPTIONS.

    Args:
        whole: of the whole image; at least one, best first.
        parts: where each part of the image is, and its captions, best first.
    """
    captions = [*whole, *(caption for _, own in parts for caption in own)]
    longest = max(len(caption.token_ids) for caption in captions)
    token_ids = np.full((len(captions), longest), wire.PADDING_TOKEN_ID, np.int32)
    logprobs = np.zeros((len(captions), longest), np.float32)
    texts = np.full((len(captions), longest), b"", np.object_)
    for row, caption in enumerate(captions):
        length = len(caption.token_ids)
        token_ids[row, :length] = caption.token_ids
        logprobs[row, :length] = caption.token_logprobs
        texts[row, :length] = text_array(*caption.token_texts)
    tensors: dict[wire.TensorSpec, Array] = {
        wire.TEXT: text_array(*(caption.text for caption in captions)),
        wire.SCORE: np.array([caption.score for caption in captions], np.float64),
        wire.FINISH_REASON: text_array(*(caption.finish_reason for caption in captions)),
        wire.CONFIDENCE: np.array([caption.confidence for caption in captions], np.float64),
        wire.DEGENERATE: np.array([caption.degenerate for caption in captions], np.bool_),
        wire.TOKEN_IDS: token_ids,
        wire.TOKEN_LOGPROBS: logprobs,
        wire.TOKEN_TEXTS: texts,
        wire.WORD_CONFIDENCES: _padded(
            [[word.confidence for word in caption.words] for caption in captions], np.float64
        ),
    }
    if any(caption.review_reasons for caption in captions):
        reasons = (" ".join(caption.review_reasons) for caption in captions)
        tensors[wire.REVIEW_REASONS] = text_array(*reasons)
    groundings = [each.token_groundings for each in captions if each.token_groundings is not None]
    # All captions of an answer have them, or none.
    if groundings:
        tensors[wire.TOKEN_GROUNDINGS] = _padded(groundings, np.float32)
    grids = [caption.attention for caption in captions if caption.attention is not None]
    if grids:
        attentions = np.zeros((len(captions), longest, *grids[0].shape[1:]), np.float32)
        for row, own in enumerate(grids):
            attentions[row, : len(own)] = own
        tensors[wire.ATTENTIONS] = attentions
    if parts:
        tensors[wire.REGION_BOXES] = np.array([box for box, _ in parts], np.int32)
        tensors[wire.REGION_CAPTIONS] = np.array([len(own) for _, own in parts], np.int32)
    return tensors


def _padded(rows: Sequence[Sequence[float]], dtype: DTypeLike) -> Array:
    """Rows of numbers as one array, as wide as the longest, with 0 behind the shorter ones."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype)
    for row, own in zip(padded, rows, strict=True):
        row[: len(own)] = own
    return padded
