"""The asyncio client; it differs from the blocking one in how it waits, and in nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from captionserve._errors import CaptionError, from_rpc_error
from captionserve._framing import Framing
from captionserve._images import ImageInput, each_image, images_of
from captionserve._many import (
    DEFAULT_WINDOW,
    GRACE_SECONDS,
    Batch,
    Outcome,
    Step,
    checked_window,
)
from captionserve._options import GenerationOptions
from captionserve._results import (
    CaptionResult,
    CaptionUpdate,
    Models,
    from_proto,
    models_from_proto,
    update_from_proto,
)
from captionserve._resumption import Resumption
from captionserve._retry import Attempts
from captionserve._transport import (
    DEFAULT_TIMEOUT_SECONDS,
    Connection,
    Metadata,
    Priority,
    Token,
    channel_options,
)
from captionserve.v1 import caption_pb2, caption_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of the generated code's two kinds of stub only the type checker knows.
Stub: TypeAlias = "caption_pb2_grpc.CaptionServiceAsyncStub"

Response = TypeVar("Response")


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
        model_version: int | None = None,
        priority: Priority | None = None,
    ) -> None:
        """Prepare a channel; it connects with the first call.

        Raises:
            RuntimeError: if no event loop is running.
            ValueError: as CaptionClient does.
        """
        # gRPC would tie the channel to some other loop and fail at the first call.
        asyncio.get_running_loop()
        self._connection = Connection.of(
            target, timeout, credentials, token, model_version, priority
        )
        self._closed = asyncio.Event()
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
        **framing: Unpack[Framing],
    ) -> CaptionResult:
        """Describe one image; cancelling the task cancels the work on the server."""
        attempts = self._connection.attempts(timeout)
        # Reading a file and encoding a picture would hold the loop up.
        request = await asyncio.to_thread(
            self._connection.request, image, options, framing, bypass_cache=bypass_cache
        )
        return from_proto(await self._answer(self._stub.Caption, request, attempts))

    async def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
        **framing: Unpack[Framing],
    ) -> AsyncGenerator[CaptionUpdate, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        As `CaptionClient.caption_stream`.
        """
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.StreamCaptionRequest(
            request=await asyncio.to_thread(
                self._connection.request, image, options, framing, bypass_cache=bypass_cache
            )
        )
        resumption = Resumption()
        while True:
            resumption.begin_anew()
            try:
                with self._errors_mapped():
                    call = self._stub.StreamCaption(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
                    try:
                        async for response in call:
                            update = resumption.fresh(update_from_proto(response))
                            if update is not None:
                                yield update
                        return
                    finally:
                        call.cancel()
            except CaptionError as error:
                await self._wait(attempts.delay_after(error))

    async def caption_many(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        options: GenerationOptions | None = None,
        *,
        window: int = DEFAULT_WINDOW,
        ordered: bool = True,
        timeout: float | None = None,
        bypass_cache: bool = False,
        **framing: Unpack[Framing],
    ) -> AsyncGenerator[Outcome, None]:
        """Describe many images over one connection, and yield what becomes of each, exactly once.

        As `CaptionClient.caption_many`; images may come from an asynchronous iterable.
        """
        batch = Batch(
            self._connection,
            options,
            framing,
            timeout=timeout,
            ordered=ordered,
            bypass_cache=bypass_cache,
        )
        many = _Many(self._stub, self._connection, batch, images, window)
        async with aclosing(many):
            while not batch.is_done:
                with self._errors_mapped():
                    await many.advance()
                for outcome in batch.outcomes():
                    many.room.release()
                    yield outcome

    async def models(self, *, timeout: float | None = None) -> Models:
        """What the service serves; as `CaptionClient.models`."""
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.GetModelsRequest()
        return models_from_proto(await self._answer(self._stub.GetModels, request, attempts))

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the service answers; as `CaptionClient.wait_ready`."""
        await self.models(timeout=timeout)

    async def close(self) -> None:
        """Close the connection; as `CaptionClient.close`."""
        self._connection.closed.set()
        self._closed.set()
        await self._channel.close()

    async def _answer(
        self, method: Callable[..., Awaitable[Response]], request: Message, attempts: Attempts
    ) -> Response:
        """Call a method that answers once, until it does."""
        while True:
            try:
                with self._errors_mapped():
                    return await method(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
            except CaptionError as error:
                await self._wait(attempts.delay_after(error))

    async def _wait(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
            raise self._connection.closed_error()

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


class _Many:
    """The pulling and the calls of one `caption_many`: the blocking client's, with tasks."""

    def __init__(
        self,
        stub: Stub,
        connection: Connection,
        batch: Batch,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        window: int,
    ) -> None:
        self.room = asyncio.Semaphore(checked_window(window))
        self._stub = stub
        self._connection = connection
        self._batch = batch
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._call: _ManyCall | None = None
        self._pulling = asyncio.create_task(self._pull(_asynchronous(images)))

    async def advance(self) -> None:
        """Wait until something happens, take it in, and send what is to be sent.

        Raises:
            CaptionError: if no call will do better.
            Exception: what pulling raised.
        """
        if self._connection.closed.is_set():
            raise self._connection.closed_error()
        # Not before all that has happened is taken in, however long the caller has been away.
        step: Step = self._batch.expire
        if not self._steps.empty():
            step = self._steps.get_nowait()
        else:
            with suppress(asyncio.TimeoutError):
                step = await asyncio.wait_for(self._steps.get(), self._batch.seconds_idle())
        step()
        if self._call is None and self._batch.wants_call:
            self._call = _ManyCall(
                self._stub, self._connection.metadata(), self._received, self._ended
            )
        if self._call is not None:
            for message in self._batch.sendable():
                self._call.send(message)
            if self._batch.is_drained:
                self._call.finish()

    async def aclose(self) -> None:
        self._pulling.cancel()
        await asyncio.wait([self._pulling])
        if self._call is not None:
            await self._call.close(answered=self._batch.is_answered)

    async def _pull(self, images: AsyncIterator[ImageInput]) -> None:
        while await self.room.acquire():
            try:
                image = await images.__anext__()
            except StopAsyncIteration:
                self._steps.put_nowait(self._batch.all_pulled)
                return
            except BaseException as error:
                self._steps.put_nowait(partial(_raise, error))
                return
            # Reading a file and encoding a picture would hold the loop up.
            self._steps.put_nowait(await asyncio.to_thread(self._batch.prepared, image))

    def _received(self, response: caption_pb2.CaptionManyResponse) -> None:
        self._steps.put_nowait(partial(self._batch.received, response))

    def _ended(self, error: CaptionError | None) -> None:
        self._steps.put_nowait(partial(self._end, error))

    def _end(self, error: CaptionError | None) -> None:
        self._call = None
        self._batch.call_ended(error)


class _ManyCall:
    """One CaptionMany call; what it hears it tells from a task of its own."""

    def __init__(
        self,
        stub: Stub,
        metadata: Metadata,
        received: Callable[[caption_pb2.CaptionManyResponse], None],
        ended: Callable[[CaptionError | None], None],
    ) -> None:
        self._received = received
        self._ended = ended
        self._outgoing: asyncio.Queue[caption_pb2.CaptionManyRequest | None] = asyncio.Queue()
        self._call = stub.CaptionMany(self._messages(), metadata=metadata)
        self._reading = asyncio.create_task(self._read())

    def send(self, message: caption_pb2.CaptionManyRequest) -> None:
        self._outgoing.put_nowait(message)

    def finish(self) -> None:
        """Send no more; the server ends the call when it has answered."""
        self._outgoing.put_nowait(None)

    async def close(self, *, answered: bool) -> None:
        """End it, and well if all is answered."""
        self.finish()
        if answered:
            await asyncio.wait([self._reading], timeout=GRACE_SECONDS)
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _messages(self) -> AsyncIterator[caption_pb2.CaptionManyRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self) -> None:
        error: CaptionError | None = None
        try:
            async for response in self._call:
                self._received(response)
        except grpc.RpcError as raised:
            error = from_rpc_error(raised)
        except asyncio.CancelledError:  # The call's: its channel has been closed.
            error = CaptionError(grpc.StatusCode.CANCELLED, "CANCELLED", "the call was cancelled")
        except Exception as raised:  # It must not end in silence: somebody waits for its word.
            error = CaptionError(grpc.StatusCode.INTERNAL, "INTERNAL", type(raised).__name__)
        self.finish()
        self._ended(error)


async def _asynchronous(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
) -> AsyncIterator[ImageInput]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            for each in images_of(image):
                yield each
    else:
        for image in each_image(images):
            yield image


def _raise(error: BaseException) -> NoReturn:
    raise error
