"""A small GRPCInferenceService: answers as the decoder does, waits, or fails as Triton fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from captionserve_server.core.engine.timeline import STAGES
from captionserve_server.gateway.kserve import decode_strings, encode_strings, kserve_type
from captionserve_server.triton import wire
from captionserve_server.triton.wire import TensorSpec
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

WAIT_SECONDS = 20.0

Context = grpc.aio.ServicerContext[Any, Any]
Outputs = Mapping[TensorSpec, "bytes | NDArray[np.generic]"]
Stream = Callable[
    [service_pb2.ModelInferRequest, Context], AsyncIterator[service_pb2.ModelStreamInferResponse]
]


def good_outputs() -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """Two captions of different lengths; strings are already encoded."""
    return {
        wire.TEXT: encode_strings(
            [b"a red apple", "un caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode()]
        ),
        wire.SCORE: np.array([-0.5, -0.75], "<f8"),
        wire.FINISH_REASON: encode_strings([b"eos", b"length"]),
        wire.CONFIDENCE: np.array([0.75, 0.5], "<f8"),
        wire.DEGENERATE: np.array([False, True]),
        wire.TOKEN_IDS: np.array([[5, 6, 2], [0, -1, -1]], "<i4"),
        wire.TOKEN_LOGPROBS: np.array([[-0.25, -0.25, -0.5], [-0.75, 0, 0]], "<f4"),
        wire.TIMES: np.array([1.7e9, *(0.001 for _ in STAGES)], np.float64),
        wire.TOKEN_TEXTS: np.array(
            [[b"a red", b" apple", b""], [b"un caf\xc3\xa9", b"", b""]], np.object_
        ),
        wire.WORD_CONFIDENCES: np.array([[0.875, 0.75, 0.5], [0.25, 0.125, 0]], "<f8"),
    }


def with_attention() -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """The same with attention over a grid of 1 x 2."""
    values = np.arange(12, dtype="<f4").reshape(2, 3, 1, 2) / 16
    return good_outputs() | {wire.ATTENTIONS: values}


def with_grounding() -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """The same with what the image adds to each token, and reasons to doubt the second caption."""
    return good_outputs() | {
        wire.TOKEN_GROUNDINGS: np.array([[2.0, 4.0, 0.0], [-1.0, 0, 0]], "<f4"),
        wire.REVIEW_REASONS: encode_strings([b"", b"low_confidence not_grounded"]),
    }


def with_region() -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """The same two captions, of which the second is that of a part of the image."""
    return good_outputs() | {
        wire.REGION_BOXES: np.array([[1, 2, 30, 40]], "<i4"),
        wire.REGION_CAPTIONS: np.array([1], "<i4"),
    }


def part_outputs(text: str, *token_ids: int) -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """A part of a caption."""
    return {
        wire.NEW_TEXT: encode_strings([text.encode()]),
        wire.NEW_TOKEN_IDS: np.array(token_ids, "<i4"),
    }


def infer_response(
    outputs: Mapping[TensorSpec, bytes | NDArray[np.generic]],
    version: str = "3",
    request_id: str = "",
) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse(
        model_name="decoder", model_version=version, id=request_id
    )
    for spec, values in outputs.items():
        raw, shape = _raw(values)
        response.outputs.add(name=spec.name, datatype=kserve_type(spec.data_type), shape=shape)
        response.raw_output_contents.append(raw)
    return response


def _raw(values: bytes | NDArray[np.generic]) -> tuple[bytes, list[int]]:
    if isinstance(values, bytes):
        return values, [len(decode_strings(values)) if is_strings(values) else 2]
    if values.dtype == np.object_:
        return encode_strings(values.ravel().tolist()), list(values.shape)
    return values.tobytes(), list(values.shape)


def is_strings(raw: bytes) -> bool:
    """Whether the bytes are whole strings; some tests cut them."""
    try:
        decode_strings(raw)
    except ValueError:
        return False
    return True


# tritonclient's generated code has no types.
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers with `stream`; keeps the requests and tells when one arrives or is cancelled.

    Questions for the description are answered apart, as `version` with `defaults`, and counted, as
    are the streams that were opened, and those that their caller has ended well.
    """

    def __init__(self) -> None:
        self.address = ""
        self.version = 3
        self.defaults: dict[str, Any] = {}
        self.described = 0
        self.opened = 0
        self.ended = 0
        self.requests: list[service_pb2.ModelInferRequest] = []
        self.seconds_left: list[float | None] = []
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.stream: Stream = self.stream_well

    def forget(self) -> None:
        """Take it that nothing has been asked yet."""
        self.described = self.opened = self.ended = 0
        self.requests.clear()
        self.seconds_left.clear()
        self.arrived.clear()

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[service_pb2.ModelInferRequest], context: Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        self.opened += 1
        async for request in requests:
            if [tensor.name for tensor in request.inputs] == [wire.DESCRIBE.name]:
                self.described += 1
                description = {"version": self.version, "defaults": self.defaults, "slots": 32}
                description |= {"precision": "int8", "image_size": [224, 224]}
                text = json.dumps(description)
                outputs = {wire.DESCRIPTION: encode_strings([text.encode()])}
                yield self.response(outputs, request)
                continue
            self.requests.append(request)
            self.seconds_left.append(context.time_remaining())
            self.arrived.set()
            try:
                async for response in self.stream(request, context):
                    yield response
                # As Triton does, where it is asked to; here also behind a last answer.
                if request.parameters["triton_enable_empty_final_response"].bool_param:
                    yield ended(request)
            except (asyncio.CancelledError, GeneratorExit):
                self.cancelled.set()
                raise
        self.ended += 1

    def response(
        self, outputs: Outputs, request: service_pb2.ModelInferRequest
    ) -> service_pb2.ModelStreamInferResponse:
        return stream_response(outputs, request, str(self.version))

    async def stream_well(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """The captions, and before them parts, where they are asked for."""
        if wire.STREAM.name in [tensor.name for tensor in request.inputs]:
            yield self.response(part_outputs("a red", 5), request)
            yield self.response(part_outputs(" apple", 6, 2), request)
        yield self.response(good_outputs(), request)

    async def stream_when_allowed(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """One part, then wait for `may_answer`."""
        yield stream_response(part_outputs("a red", 5), request)
        await self.may_answer.wait()
        yield stream_response(good_outputs(), request)

    async def stream_and_stay(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """The captions, and then no end."""
        yield stream_response(good_outputs(), request)
        await asyncio.Event().wait()

    async def stream_on_and_on(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """More text than the connection takes in before the caller reads it, without an end."""
        while True:
            yield stream_response(part_outputs(100_000 * "a", 5), request)

    def fail_stream(self, code: grpc.StatusCode, details: str) -> None:
        """One part, then a status."""

        async def stream(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
            yield stream_response(part_outputs("a red", 5), request)
            await context.abort(code, details)

        self.stream = stream

    def stream_error(self, message: str) -> None:
        """One part, then an error as Triton sends it on a stream."""

        async def stream(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
            yield stream_response(part_outputs("a red", 5), request)
            yield service_pb2.ModelStreamInferResponse(error_message=message)

        self.stream = stream

    def stream_parts(self, *outputs: Mapping[TensorSpec, bytes | NDArray[np.generic]]) -> None:
        """These responses and no more."""

        async def stream(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
            for each in outputs:
                yield stream_response(each, request)

        self.stream = stream

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """A status, and no part."""

        async def stream(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
            await context.abort(code, details)
            yield service_pb2.ModelStreamInferResponse()

        self.stream = stream

    def answer_with(self, response: service_pb2.ModelInferResponse) -> None:
        """This response and no more."""

        async def stream(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
            yield service_pb2.ModelStreamInferResponse(infer_response=response)

        self.stream = stream


def stream_response(
    outputs: Mapping[TensorSpec, bytes | NDArray[np.generic]],
    request: service_pb2.ModelInferRequest,
    version: str = "3",
) -> service_pb2.ModelStreamInferResponse:
    return service_pb2.ModelStreamInferResponse(
        infer_response=infer_response(outputs, version, request_id=request.id)
    )


def ended(request: service_pb2.ModelInferRequest) -> service_pb2.ModelStreamInferResponse:
    """Triton's word that a model has ended."""
    response = stream_response({}, request)
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response


@asynccontextmanager
async def fake_triton(address: str = "127.0.0.1:0") -> AsyncIterator[FakeTriton]:
    """Serve there, or on a free port."""
    servicer = FakeTriton()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    host, _, _ = address.partition(":")
    servicer.address = f"{host}:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield servicer
    finally:
        await server.stop(None)
