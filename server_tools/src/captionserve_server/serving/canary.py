"""A real caption as the proof of readiness: Triton calls itself ready before anything has decoded."""

from __future__ import annotations

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from captionserve_server.core import tensors
from captionserve_server.serving.triton_process import TritonStartError

# One black pixel as a binary PPM: the smallest image there is.
_IMAGE = b"P6 1 1 255\n\0\0\0"


async def wait_for_caption(triton_grpc: str, timeout_seconds: float) -> None:
    """Caption one tiny image with Triton's `captioner`.

    Args:
        triton_grpc: host:port of Triton's gRPC service.
        timeout_seconds: how long the caption may take.

    Raises:
        TritonStartError: if it fails or takes longer.
    """
    request = service_pb2.ModelInferRequest(model_name=tensors.CAPTIONER.name)
    _add_bytes(request, tensors.IMAGE, _IMAGE)
    async with grpc.aio.insecure_channel(triton_grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            await stub.ModelInfer(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise TritonStartError(f"the first caption failed: {error.details()}") from error


def _add_bytes(
    request: service_pb2.ModelInferRequest, spec: tensors.TensorSpec, value: bytes
) -> None:
    tensor = request.inputs.add(name=spec.name, datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(value)
