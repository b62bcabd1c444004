"""A real gateway in front of the fake Triton, and a bare stub that talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.gateway.server import Gateway
from captionserve_server.settings import Settings
from google.protobuf.message import Message
from google.rpc import status_pb2

from tests.unit.gateway.fake_triton import WAIT_SECONDS, FakeTriton, fake_triton

IMAGE = b"an image"
MessageType = TypeVar("MessageType", bound=Message)


def request_of(image: bytes = IMAGE, **options: Any) -> caption_pb2.CaptionRequest:
    return caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=image),
        options=caption_pb2.GenerationOptions(**options),
    )


@dataclass
class Setup:
    """Everything a test talks to; the channel is the caller's."""

    gateway: Gateway
    triton: FakeTriton
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return caption_pb2_grpc.CaptionServiceStub(self.channel)

    async def disconnect(self) -> None:
        """Take the gateway's Triton away."""
        decoder = await self.gateway.disconnect()
        assert decoder is not None
        await decoder.close()


@asynccontextmanager
async def gateway_setup(
    defaults: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Setup]:
    """A gateway that is connected and serves.

    Args:
        defaults: of the fake Triton's checkpoint.
        settings: of the gateway.
    """
    async with fake_triton() as triton:
        triton.defaults = defaults or {}
        gateway = Gateway(settings_of(**settings))
        await gateway.start()
        await gateway.connect(triton.address, [triton.version], WAIT_SECONDS)
        triton.forget()
        options = [("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)]
        try:
            async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
                yield Setup(gateway, triton, channel)
        finally:
            await gateway.drain(asyncio.Event())
            await gateway.close()


def settings_of(**settings: Any) -> Settings:
    """Settings of a service on a free port; a gateway does not look at the repository."""
    return Settings(**{"model_repository": Path(), "listen": "127.0.0.1:0", **settings})


def detail_of(error: grpc.aio.AioRpcError, detail: MessageType) -> MessageType:
    """The status detail of `detail`'s type, read into it; stays empty when there is none."""
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                packed.Unpack(detail)
    return detail
