"""The asyncio client; it differs from the blocking one in how it waits, and in nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import TracebackType

import grpc

from captionserve._errors import CaptionError, from_rpc_error
from captionserve._images import ImageInput
from captionserve._options import GenerationOptions
from captionserve._results import (
    CaptionResult,
    CaptionUpdate,
    from_proto,
    update_from_proto,
)
from captionserve._transport import (
    DEFAULT_TIMEOUT_SECONDS,
    Connection,
    Token,
    build_request,
    channel_options,
)
from captionserve.v1 import caption_pb2, caption_pb2_grpc


class AsyncCaptionClient:
    """Captions images with a captionserve service, from the event loop that it is made in.

    Use it as a context manager, or close it:

        async with AsyncCaptionClient("127.0.0.1:9000") as client:
            print((await client.caption("photo.jpg")).text)

    All arguments and errors are those of `CaptionClient`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        credentials: grpc.ChannelCredentials | None = None,
        token: Token | None = None,
    ) -> None:
        """Prepare a channel; it connects with the first call.

        Raises:
            RuntimeError: if no event loop is running.
            ValueError: as CaptionClient does.
        """
        # gRPC would tie the channel to some other loop and fail at the first call.
        asyncio.get_running_loop()
        self._connection = Connection.of(target, timeout, credentials, token)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, channel_options())
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, channel_options())
        self._stub = caption_pb2_grpc.CaptionServiceStub(self._channel)

    async def caption(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
    ) -> CaptionResult:
        """Describe one image; cancelling the task cancels the work on the server."""
        attempts = self._connection.attempts(timeout)
        # Reading a file and encoding a picture would hold the loop up.
        request = await asyncio.to_thread(build_request, image, options, bypass_cache=bypass_cache)
        while True:
            try:
                with self._errors_mapped():
                    response = await self._stub.Caption(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
                return from_proto(response)
            except CaptionError as error:
                await asyncio.sleep(attempts.delay_after(error))

    async def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
    ) -> AsyncGenerator[CaptionUpdate, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        As `CaptionClient.caption_stream`.
        """
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.StreamCaptionRequest(
            request=await asyncio.to_thread(
                build_request, image, options, bypass_cache=bypass_cache
            )
        )
        begun = False
        while True:
            try:
                with self._errors_mapped():
                    call = self._stub.StreamCaption(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
                    try:
                        async for response in call:
                            begun = True
                            yield update_from_proto(response)
                        return
                    finally:
                        call.cancel()
            except CaptionError as error:
                if begun:
                    raise
                await asyncio.sleep(attempts.delay_after(error))

    async def close(self) -> None:
        """Close the connection; calls in flight, and later ones, fail with CLIENT_CLOSED."""
        self._connection.closed.set()
        await self._channel.close()

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        """Turn gRPC's errors into CaptionError."""
        try:
            yield
        except grpc.RpcError as error:
            if self._connection.closed.is_set():
                raise self._connection.closed_error() from error
            raise from_rpc_error(error) from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            # A call whose channel is closed ends as in a cancelled task.
            if self._connection.closed.is_set():
                raise self._connection.closed_error() from error
            raise

    async def __aenter__(self) -> AsyncCaptionClient:
        """Give the client itself."""
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()
