"""The public CaptionService: admits a call, asks Triton, answers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from captionserve.v1 import caption_pb2
from structlog.contextvars import bind_contextvars

from captionserve_server.core.engine.timeline import Stage, stages_of
from captionserve_server.core.errors import (
    ModelFaultError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.admission import Turns
from captionserve_server.gateway.cache import AnswerCache, SharedWork, answer_key, image_digest
from captionserve_server.gateway.calls import Call
from captionserve_server.gateway.canary import canary
from captionserve_server.gateway.conversion import (
    Message,
    add_stages,
    caption_part,
    caption_response,
    effective_options,
    limits_message,
    model_message,
)
from captionserve_server.gateway.decoder_client import (
    Answer,
    DecoderClient,
    Description,
    TimeLimit,
)
from captionserve_server.gateway.kserve import InputTensor
from captionserve_server.gateway.metrics import GatewayMetrics
from captionserve_server.gateway.stages import turn_stage
from captionserve_server.gateway.suspects import Suspects
from captionserve_server.settings import Settings
from captionserve_server.tracing import Traces
from captionserve_server.triton import wire

# Of the time left, what a partial caption needs to come to the end of a decoding step and back.
_PARTIAL_MARGIN = 0.1
_LEAST_MARGIN_SECONDS = 0.05
_MOST_MARGIN_SECONDS = 0.5
_LEAST_MODEL_SECONDS = 0.001

_STARTING = "the model server is being started"
_UNREADABLE = "the model gave an answer that cannot be read"

# Besides those that the decoder has slots for, so that it need not wait for the next.
_SPARE_TURNS = 4
# Until the decoder has said how many slots it has.
_FIRST_TURNS = 32

SERVICE_NAME = caption_pb2.DESCRIPTOR.services_by_name["CaptionService"].full_name


@dataclass(frozen=True)
class _Work:
    """A caption that is to be computed.

    Attributes:
        message: what the decoder is asked.
        image: the image's digest.
        call: for whom.
        until: when the decoder must have answered, by the event loop's clock.
        version: of the model.
        key: of the answer, where it is to be remembered.
    """

    message: Message
    image: bytes
    call: Call
    until: float
    version: int
    key: bytes | None


class Captioned(NamedTuple):
    """A caption that was computed, and the stages that it has passed."""

    response: caption_pb2.CaptionResponse
    stages: list[Stage]


class CaptionService:
    """Answers caption calls from the decoder; errors are raised, for the interceptor to map.

    Attributes:
        last_answer: when the decoder last gave captions, by the event loop's clock.
        turns: the queue before the decoder.
    """

    def __init__(
        self, cache: AnswerCache, metrics: GatewayMetrics, traces: Traces, settings: Settings
    ) -> None:
        """Serve, from the decoder that is connected.

        Args:
            cache: where reproducible answers are kept.
            metrics: told of captions.
            traces: told of their stages.
            settings: what calls are allowed.
        """
        self._cache = cache
        self._metrics = metrics
        self._traces = traces
        self._settings = settings
        self._decoder: DecoderClient | None = None
        self._suspects = Suspects()
        self.turns = Turns(_FIRST_TURNS)
        self.last_answer = -math.inf
        self._captions: SharedWork[Captioned] = SharedWork()
        # By version; stays while no decoder is connected, for what is remembered of its answers.
        self._descriptions: Mapping[int, Description] = {}

    def connect(
        self, decoder: DecoderClient, descriptions: Sequence[Description]
    ) -> DecoderClient | None:
        """Ask this decoder from now on; whom was asked until now, and may still be answering.

        Args:
            decoder: whom to ask.
            descriptions: its versions; the newest is the default.
        """
        former, self._decoder = self._decoder, decoder
        self._descriptions = {each.version: each for each in descriptions}
        self.turns.at_once = self._described(0).slots + _SPARE_TURNS
        return former

    def disconnect(self) -> DecoderClient | None:
        """Ask nobody, and fail what is in flight; whom was asked until now.

        What is remembered goes on to be answered.
        """
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            self._suspects.decoder_died()
            decoder.abandon()
        return decoder

    async def ask(
        self, inputs: Sequence[InputTensor], version: int, time_limit: TimeLimit
    ) -> Answer:
        """What the decoder makes of a message, past everything that stands before it here.

        Raises:
            CaptionServeError: as the decoder's client does.
        """
        answer = await self._connected().caption(inputs, version, time_limit)
        self.last_answer = asyncio.get_running_loop().time()
        return answer

    async def prove(self, time_limit: TimeLimit) -> None:
        """Ask for a caption of the default version; CaptionServeError if there is none."""
        description = self._described(0)
        await self.ask(canary(description), description.version, time_limit)

    def _described(self, version: int) -> Description:
        """What a version is; 0 for the default.

        Raises:
            ModelUnavailableError: if no decoder has been connected yet.
            ModelNotFoundError: if the version is not served.
        """
        if not self._descriptions:
            raise ModelUnavailableError(_STARTING)
        found = self._descriptions.get(version or max(self._descriptions))
        if found is None:
            raise ModelNotFoundError(f"version {version} of the model is not served")
        return found

    def _connected(self) -> DecoderClient:
        if self._decoder is None:
            raise ModelUnavailableError(_STARTING)
        return self._decoder

    async def caption(self, message: Message, call: Call) -> caption_pb2.CaptionResponse:
        """Describe one image.

        What would be the same the next time is remembered, and computed once for all who ask for it
        meanwhile. With bypass_cache it is computed for this call alone, and remembered as well.
        """
        call = prioritised(call, message)
        description = self._described(message.model_version)
        options = effective_options(description.defaults, message)
        image = await image_digest(message.image)
        version, key = description.version, None
        if options.reproducible:
            scope = call.identity if self._settings.cache_scope == "identity" else ""
            # What tells of its stages is the same answer.
            remembered_as = (
                dataclasses.replace(options, output_stages=False)
                if options.output_stages
                else options
            )
            key = answer_key(image, message.framing, remembered_as, version, scope)
        work = _Work(message, image, call, call.deadline, version, key)
        admit = partial(
            self.turns.check,
            call.identity,
            views=message.framing.views,
            bulk=call.bulk,
            deadline=call.deadline,
        )
        if key is None or message.bypass_cache:
            computed, _ = await self._captions.run(
                object(), lambda: self._caption(work), call.seconds_left, admit=admit
            )
            self._tell(computed.stages)
            return _answered(computed, options)
        remembered = self._cache.get(key)
        if remembered is not None:
            self._metrics.cache_hits.inc()
            remembered.cached = True
            return remembered
        # Others may join who have more time than this caller.
        cap = asyncio.get_running_loop().time() + self._settings.deadline_cap_seconds
        shared = dataclasses.replace(work, until=cap)
        computed, joined = await self._captions.run(
            key, lambda: self._caption(shared), call.seconds_left, admit=admit
        )
        self._tell(computed.stages)
        if not joined:
            return _answered(computed, options)
        self._metrics.cache_joined.inc()
        own = caption_pb2.CaptionResponse()
        own.CopyFrom(computed.response)
        own.cached = True
        return own

    async def stream_caption(
        self, message: Message, call: Call
    ) -> AsyncIterator[caption_pb2.StreamCaptionResponse]:
        """Describe one image, word by word; neither remembered nor shared."""
        call = prioritised(call, message)
        description = self._described(message.model_version)
        options = effective_options(description.defaults, message)
        inputs = message.inputs(stream=True)
        image = await image_digest(message.image)
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(
                self._working(image, message.framing.views, call)
            )
            time_limit = _time_limit(message, call.deadline)
            stream = self._connected().stream(inputs, description.version, time_limit)
            answers = await stack.enter_async_context(aclosing(stream))
            async for answer in answers:
                if answer.is_final:
                    self.last_answer = asyncio.get_running_loop().time()
                    computed = self._computed(answer, turn)
                    self._tell(computed.stages)
                    yield caption_pb2.StreamCaptionResponse(response=_answered(computed, options))
                else:
                    yield caption_pb2.StreamCaptionResponse(part=_part(answer))

    async def models(
        self, request: caption_pb2.GetModelsRequest, call: Call
    ) -> caption_pb2.GetModelsResponse:
        """Say what is served; ModelUnavailableError while nothing is."""
        self._connected()
        default = self._described(0)
        return caption_pb2.GetModelsResponse(
            models=[
                model_message(self._descriptions[version], is_default=version == default.version)
                for version in sorted(self._descriptions, reverse=True)
            ],
            limits=limits_message(self._settings),
            load=caption_pb2.Load(
                slots=default.slots,
                working=self.turns.working,
                waiting=self.turns.waiting,
            ),
        )

    @asynccontextmanager
    async def _working(self, image: bytes, views: int, call: Call) -> AsyncIterator[Stage]:
        """Have the decoder's attention for an image while the block runs; what that has taken.

        Args:
            image: its digest.
            views: the pictures that are captioned: the whole, and its parts.
            call: for whom.
        """
        clock = asyncio.get_running_loop().time
        begin = clock()
        async with (
            self._suspects.alone(image, call.seconds_left),
            self.turns.turn(call.identity, views=views, bulk=call.bulk, deadline=call.deadline),
        ):
            with self._suspects.in_work(image):
                yield turn_stage(clock() - begin)

    async def _caption(self, work: _Work) -> Captioned:
        """Have it captioned, and remember the answer where there is a key."""
        async with self._working(work.image, work.message.framing.views, work.call) as turn:
            time_limit = _time_limit(work.message, work.until)
            answer = await self.ask(work.message.inputs(), work.version, time_limit)
        computed = self._computed(answer, turn)
        if work.key is not None:
            self._cache.put(work.key, computed.response)
        return computed

    def _computed(self, answer: Answer, turn: Stage) -> Captioned:
        """What the decoder's last answer says, counted."""
        response, decoder_stages = read_answer(answer)
        stages = [turn, *decoder_stages]
        described = (response.captions, *(region.captions for region in response.regions))
        tokens = sum(len(caption.token_ids) for each in described for caption in each)
        self._metrics.caption(stages, tokens)
        return Captioned(response, stages)

    def _tell(self, stages: Sequence[Stage]) -> None:
        """Tell a call's log line and trace of the stages that it has waited for."""
        bind_contextvars(stages={stage.name: round(stage.seconds, 4) for stage in stages})
        self._traces.stages(stages)


def read_answer(answer: Answer) -> Captioned:
    """What a decoder's last answer says; ModelFaultError if it cannot be read."""
    try:
        response = caption_response(answer.outputs, answer.model_version)
        return Captioned(response, stages_of(answer.outputs[wire.TIMES.name].values))
    except (ValueError, LookupError) as error:
        raise ModelFaultError(_UNREADABLE) from error


def _answered(computed: Captioned, options: DecodingOptions) -> caption_pb2.CaptionResponse:
    """A computed answer as its caller gets it, with its stages where these are wanted.

    They are no part of the answer that is remembered, and shared with others: it has none for them.
    """
    if not options.output_stages:
        return computed.response
    own = caption_pb2.CaptionResponse()
    own.CopyFrom(computed.response)
    add_stages(own, computed.stages)
    return own


def prioritised(call: Call, message: Message) -> Call:
    """The call with the priority that its message asks for, if it does."""
    return call if message.bulk is None else dataclasses.replace(call, bulk=message.bulk)


def _time_limit(message: Message, deadline: float) -> TimeLimit:
    # Triton takes a limit of 0 for none.
    seconds = max(deadline - asyncio.get_running_loop().time(), _LEAST_MODEL_SECONDS)
    if not message.given.get("allow_partial"):
        return TimeLimit(call_seconds=seconds, model_seconds=seconds)
    margin = min(max(_PARTIAL_MARGIN * seconds, _LEAST_MARGIN_SECONDS), _MOST_MARGIN_SECONDS)
    return TimeLimit(seconds, max(seconds - margin, _LEAST_MODEL_SECONDS))


def _part(answer: Answer) -> caption_pb2.CaptionPart:
    try:
        return caption_part(answer.outputs)
    except (ValueError, LookupError) as error:
        raise ModelFaultError(_UNREADABLE) from error
