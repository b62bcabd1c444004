"""The public CaptionService: admits a call, asks Triton, answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any

import grpc
from captionserve.v1 import caption_pb2, caption_pb2_grpc

from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
)
from captionserve_server.gateway.cache import AnswerCache, SharedWork, answer_key, image_digest
from captionserve_server.gateway.conversion import (
    Message,
    caption_part,
    caption_response,
    decoder_message,
)
from captionserve_server.gateway.decoder_client import (
    Answer,
    DecoderClient,
    Description,
    TimeLimit,
)
from captionserve_server.gateway.kserve import InputTensor
from captionserve_server.gateway.metrics import GatewayMetrics
from captionserve_server.gateway.suspects import Suspects
from captionserve_server.settings import Settings

Context = grpc.aio.ServicerContext[Any, Any]

# Of the time left, what a partial caption needs to come to the end of a decoding step and back.
_PARTIAL_MARGIN = 0.1
_LEAST_MARGIN_SECONDS = 0.05
_MOST_MARGIN_SECONDS = 0.5
_LEAST_MODEL_SECONDS = 0.001

_UNREADABLE = "the model gave an answer that cannot be read"

SERVICE_NAME = caption_pb2.DESCRIPTOR.services_by_name["CaptionService"].full_name


class CaptionService(caption_pb2_grpc.CaptionServiceServicer):
    """Answers caption calls from the decoder; errors are raised, for the interceptor to map.

    Attributes:
        last_answer: when the decoder last gave captions, by the event loop's clock.
    """

    def __init__(self, cache: AnswerCache, metrics: GatewayMetrics, settings: Settings) -> None:
        """Serve, from the decoder that is connected.

        Args:
            cache: where reproducible answers are kept.
            metrics: told of answers that were not computed for their call.
            settings: what calls are allowed.
        """
        self._cache = cache
        self._metrics = metrics
        self._max_concurrent_calls = settings.max_concurrent_calls
        self._deadline_cap_seconds = settings.deadline_cap_seconds
        self._decoder: DecoderClient | None = None
        self._suspects = Suspects()
        self.last_answer = -math.inf
        self._captions: SharedWork[caption_pb2.CaptionResponse] = SharedWork()
        self._descriptions: SharedWork[Description] = SharedWork()
        self._description: Description | None = None
        self._working = 0
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is in flight, the sending of its answer included."""
        await self._idle.wait()

    def connect(self, decoder: DecoderClient) -> None:
        """Ask this decoder, and what it is."""
        self._decoder = decoder
        self._description = None

    def disconnect(self) -> DecoderClient | None:
        """Ask nobody, and fail what is in flight; whom was asked until now.

        What is remembered goes on to be answered.
        """
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            self._suspects.decoder_died()
            decoder.abandon()
        return decoder

    async def ask(self, inputs: Sequence[InputTensor], time_limit: TimeLimit) -> Answer:
        """What the decoder makes of a message, past everything that stands before it here.

        Raises:
            CaptionServeError: as the decoder's client does.
        """
        answer = await self._connected().caption(inputs, time_limit)
        self.last_answer = asyncio.get_running_loop().time()
        return answer

    def _connected(self) -> DecoderClient:
        if self._decoder is None:
            raise ModelUnavailableError("the model server is being started")
        return self._decoder

    async def Caption(  # noqa: N802 - the name is the API's.
        self,
        request: caption_pb2.CaptionRequest,
        context: Context,
    ) -> caption_pb2.CaptionResponse:
        """Describe one image.

        What would be the same the next time is remembered, and computed once for all who ask for it
        meanwhile. With bypass_cache it is computed for this call alone, and remembered as well.
        """
        self._begin(context)
        with self._admitted():
            message = decoder_message(request)
            description = await self._described(context)
            options = description.defaults.with_given(message.given)
            image = await image_digest(message.image)
            key, version = None, description.version
            if options.reproducible:
                key = answer_key(image, options, version)
            if key is None or request.bypass_cache:
                limit = self._time_limit(request, context)
                response, _ = await self._captions.run(
                    object(),
                    lambda: self._caption(message, image, limit, key, version),
                    limit.call_seconds,
                )
                return response
            remembered = self._cache.get(key)
            if remembered is not None:
                self._metrics.cache_hits.inc()
                remembered.cached = True
                return remembered
            # Others may join who have more time than this caller.
            limit = TimeLimit(self._deadline_cap_seconds, self._deadline_cap_seconds)
            response, joined = await self._captions.run(
                key,
                lambda: self._caption(message, image, limit, key, version),
                self._seconds_left(context),
            )
            if not joined:
                return response
            self._metrics.cache_joined.inc()
            own = caption_pb2.CaptionResponse()
            own.CopyFrom(response)
            own.cached = True
            return own

    async def StreamCaption(  # noqa: N802 - the name is the API's.
        self,
        request: caption_pb2.StreamCaptionRequest,
        context: Context,
    ) -> AsyncIterator[caption_pb2.StreamCaptionResponse]:
        """Describe one image, word by word; neither remembered nor shared."""
        self._begin(context)
        with self._admitted():
            message = decoder_message(request.request)
            description = await self._described(context)
            description.defaults.with_given(message.given)
            inputs = message.inputs(stream=True)
            image = await image_digest(message.image)
            async with AsyncExitStack() as stack:
                seconds = self._seconds_left(context)
                await stack.enter_async_context(self._suspects.in_work(image, seconds))
                time_limit = self._time_limit(request.request, context)
                stream = self._connected().stream(inputs, time_limit)
                answers = await stack.enter_async_context(aclosing(stream))
                async for answer in answers:
                    if answer.is_final:
                        self.last_answer = asyncio.get_running_loop().time()
                        response = self._response(answer)
                        yield caption_pb2.StreamCaptionResponse(response=response)
                    else:
                        yield caption_pb2.StreamCaptionResponse(part=_part(answer))

    async def _described(self, context: Context) -> Description:
        """What the decoder is: remembered, or asked once for all who wait for it."""

        async def describe() -> Description:
            # Kept by the work itself: whoever comes before its first waiter wakes finds it.
            self._description = await self._connected().describe()
            return self._description

        if self._description is not None:
            return self._description
        seconds = self._seconds_left(context)
        description, _ = await self._descriptions.run("description", describe, seconds)
        return description

    async def _caption(
        self,
        message: Message,
        image: bytes,
        time_limit: TimeLimit,
        key: bytes | None,
        version: int,
    ) -> caption_pb2.CaptionResponse:
        """Have it captioned, and remember the answer where there is a key, made for `version`."""
        async with self._suspects.in_work(image, time_limit.call_seconds):
            answer = await self.ask(message.inputs(), time_limit)
        response = self._response(answer)
        # Another version may have taken over since the key was made.
        if key is not None and answer.model_version == version:
            self._cache.put(key, response)
        return response

    def _response(self, answer: Answer) -> caption_pb2.CaptionResponse:
        if self._description is not None and self._description.version != answer.model_version:
            self._description = None
        try:
            return caption_response(answer.outputs, answer.model_version)
        except (ValueError, LookupError) as error:
            raise ModelFaultError(_UNREADABLE) from error

    def _begin(self, context: Context) -> None:
        self._unfinished += 1
        self._idle.clear()
        # Any: the stubs' type of a callback is a class that no method is of.
        end: Any = self._end
        context.add_done_callback(end)

    def _end(self, context: object) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._idle.set()

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._working >= self._max_concurrent_calls:
            raise OverloadedError("too many requests are in progress")
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def _time_limit(self, request: caption_pb2.CaptionRequest, context: Context) -> TimeLimit:
        # Triton takes a limit of 0 for none.
        seconds = max(self._seconds_left(context), _LEAST_MODEL_SECONDS)
        if not request.options.allow_partial:
            return TimeLimit(call_seconds=seconds, model_seconds=seconds)
        margin = min(max(_PARTIAL_MARGIN * seconds, _LEAST_MARGIN_SECONDS), _MOST_MARGIN_SECONDS)
        return TimeLimit(seconds, max(seconds - margin, _LEAST_MODEL_SECONDS))

    def _seconds_left(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()
        if remaining is None:
            return self._deadline_cap_seconds
        if remaining <= 0:
            raise DeadlineExceededError("the deadline passed before the caption was begun")
        return min(remaining, self._deadline_cap_seconds)


def _part(answer: Answer) -> caption_pb2.CaptionPart:
    try:
        return caption_part(answer.outputs)
    except LookupError as error:
        raise ModelFaultError(_UNREADABLE) from error
