"""A small GRPCInferenceService: answers as the captioner does, waits, or fails as Triton fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from captionserve_server.core import tensors
from captionserve_server.core.tensors import TensorSpec
from captionserve_server.gateway.kserve import encode_strings, kserve_type
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

WAIT_SECONDS = 20.0

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[
    [service_pb2.ModelInferRequest, Context], Awaitable[service_pb2.ModelInferResponse]
]


def good_outputs() -> dict[TensorSpec, bytes | NDArray[np.generic]]:
    """Two captions of different lengths; strings are already encoded."""
    return {
        tensors.TEXT: encode_strings(
            [b"a red apple", "un caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode()]
        ),
        tensors.SCORE: np.array([-0.5, -0.75], "<f8"),
        tensors.FINISH_REASON: encode_strings([b"eos", b"length"]),
        tensors.TOKEN_IDS: np.array([[5, 6, 2], [0, -1, -1]], "<i4"),
        tensors.TOKEN_LOGPROBS: np.array([[-0.25, -0.25, -0.5], [-0.75, 0, 0]], "<f4"),
    }


def infer_response(
    outputs: Mapping[TensorSpec, bytes | NDArray[np.generic]], version: str = "3"
) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse(model_name="captioner", model_version=version)
    for spec, values in outputs.items():
        shape = [2] if isinstance(values, bytes) else values.shape
        raw = values if isinstance(values, bytes) else values.tobytes()
        response.outputs.add(name=spec.name, datatype=kserve_type(spec.data_type), shape=shape)
        response.raw_output_contents.append(raw)
    return response


# tritonclient's generated code has no types.
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers with `answer`; keeps the requests and tells when one arrives or is cancelled."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[service_pb2.ModelInferRequest] = []
        self.seconds_left: list[float | None] = []
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.answer: Answer = self.answer_well

    async def ModelInfer(  # noqa: N802
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> service_pb2.ModelInferResponse:
        self.requests.append(request)
        self.seconds_left.append(context.time_remaining())
        self.arrived.set()
        return await self.answer(request, context)

    async def answer_well(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> service_pb2.ModelInferResponse:
        return infer_response(good_outputs())

    async def answer_when_allowed(
        self, request: service_pb2.ModelInferRequest, context: Context
    ) -> service_pb2.ModelInferResponse:
        """Wait for `may_answer`; `cancelled` tells that the gateway gave up first."""
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return infer_response(good_outputs())

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        async def answer(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> service_pb2.ModelInferResponse:
            await context.abort(code, details)

        self.answer = answer

    def answer_with(self, response: service_pb2.ModelInferResponse) -> None:
        async def answer(
            request: service_pb2.ModelInferRequest, context: Context
        ) -> service_pb2.ModelInferResponse:
            return response

        self.answer = answer


@asynccontextmanager
async def fake_triton() -> AsyncIterator[FakeTriton]:
    """Serve on a free port."""
    servicer = FakeTriton()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield servicer
    finally:
        await server.stop(None)
