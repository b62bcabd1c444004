"""The blocking client."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from captionserve._errors import CaptionError, from_rpc_error
from captionserve._framing import Framing
from captionserve._images import ImageInput, each_image
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

Response = TypeVar("Response")


class CaptionClient:
    """Captions images with a captionserve service; may be shared by threads, not by a fork.

    Use it as a context manager, or close it:

        with CaptionClient("127.0.0.1:9000") as client:
            print(client.caption("photo.jpg").text)

    A service that cannot answer now is waited for: a call is tried again until its time is up.
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

        Args:
            target: host:port of the service, or a target as gRPC names it, such as
                dns:///captions:9000, which spreads calls over all addresses of the name.
            timeout: seconds a call may take when it does not say otherwise.
            credentials: for TLS, see `tls_credentials`; without them nothing is encrypted.
            token: says who calls, a text or a callable that gives it; needs TLS, unless the service
                is on this machine.
            model_version: which version of the model answers; None for the service's newest.
            priority: whose turn comes first, "interactive" or "bulk"; None for interactive, and
                bulk in `caption_many`.

        Raises:
            ValueError: if an argument cannot be what it is, or the token would travel in the clear.
        """
        self._connection = Connection.of(
            target, timeout, credentials, token, model_version, priority
        )
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel_options())
        else:
            self._channel = grpc.secure_channel(target, credentials, channel_options())
        self._stub = caption_pb2_grpc.CaptionServiceStub(self._channel)

    def caption(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
        **framing: Unpack[Framing],
    ) -> CaptionResult:
        """Describe one image.

        Args:
            image: a path, an encoded image as bytes, a binary file object, a PIL image, a uint8
                array of shape (height, width, 3), or a float array or torch tensor of shape
                (3, height, width) as the checkpoint's own image processor makes it.
            options: how to decode; None leaves everything to the server.
            timeout: seconds the call may take, retries included; None takes the client's.
            bypass_cache: have the answer computed anew, whatever the server remembers.
            **framing: `regions`, parts to be described beside the whole, each (left, top, right,
                bottom) in pixels of the upright image; `tiles`, (rows, columns) of a grid whose
                cells are, too; `resize`, "checkpoint", "center_crop" or "letterbox". See Framing.

        Raises:
            CaptionError: if the call failed, or an option cannot be sent.
            TypeError: if the image has the wrong type.
            ValueError: if the image or the timeout cannot be sent.
            OSError: if the image's file cannot be read.
        """
        attempts = self._connection.attempts(timeout)
        request = self._connection.request(image, options, framing, bypass_cache=bypass_cache)
        return from_proto(self._answer(self._stub.Caption, request, attempts))

    def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
        **framing: Unpack[Framing],
    ) -> Generator[CaptionUpdate, None, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        The words of greedy search and sampling come one by one, those of beam search when all beams
        that are left share them. Closing the generator, which leaving a loop over it does unless
        somebody else holds it, ends the work on the server. Errors are raised from within the loop.
        A stream that breaks is asked for again, and goes on behind the words that were given; where
        the service tells another caption then, as it does when sampling without a seed, it fails
        with STREAM_BROKEN. Streams are not remembered, so that bypass_cache changes nothing.
        The words are the whole image's; what its parts show comes with the result. Arguments and
        errors are those of `caption`.
        """
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.StreamCaptionRequest(
            request=self._connection.request(image, options, framing, bypass_cache=bypass_cache)
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
                        for response in call:
                            update = resumption.fresh(update_from_proto(response))
                            if update is not None:
                                yield update
                        return
                    finally:
                        call.cancel()
            except CaptionError as error:
                self._wait(attempts.delay_after(error))

    def caption_many(
        self,
        images: Iterable[ImageInput],
        options: GenerationOptions | None = None,
        *,
        window: int = DEFAULT_WINDOW,
        ordered: bool = True,
        timeout: float | None = None,
        bypass_cache: bool = False,
        **framing: Unpack[Framing],
    ) -> Generator[Outcome, None, None]:
        """Describe many images over one connection, and yield what becomes of each, exactly once.

        Images are pulled by a thread of its own as there is room for them, so that no outcome waits
        for an image that is still to come. A connection that is lost, or a service that restarts,
        is waited for; what was under way then is asked for again. Closing the generator ends the
        work on the server.

        Args:
            images: each as `caption` takes it, or a float array of shape (images, 3, height,
                width), which is so many of them; what iterating over them raises is raised.
            options: as for `caption`, for all images.
            window: how many images may be pulled and not yet given out.
            ordered: whether outcomes come in the images' order, else as they are finished.
            timeout: as for `caption`, for each image, once it has been read.
            bypass_cache: as for `caption`.
            **framing: as for `caption`, for all images.

        Raises:
            CaptionError: if the service refuses all calls, or the client is closed.
            ValueError: if the window or the timeout is not positive.
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
        with closing(many):
            while not batch.is_done:
                with self._errors_mapped():
                    many.advance()
                for outcome in batch.outcomes():
                    many.room.release()
                    yield outcome

    def models(self, *, timeout: float | None = None) -> Models:
        """What the service serves, with which limits, and how busy it is.

        Raises:
            CaptionError: if the call failed.
            ValueError: if the timeout is not a positive, finite number.
        """
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.GetModelsRequest()
        return models_from_proto(self._answer(self._stub.GetModels, request, attempts))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the service answers, for so many seconds at most.

        Raises:
            CaptionError: why it does not, when the time is up or waiting is of no use.
            ValueError: if the timeout is not a positive, finite number.
        """
        self.models(timeout=timeout)

    def close(self) -> None:
        """Close the connection; calls in flight, and later ones, fail with CLIENT_CLOSED."""
        self._connection.closed.set()
        self._channel.close()

    def _answer(
        self, method: Callable[..., Response], request: Message, attempts: Attempts
    ) -> Response:
        """Call a method that answers once, until it does."""
        while True:
            try:
                with self._errors_mapped():
                    return method(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
            except CaptionError as error:
                self._wait(attempts.delay_after(error))

    def _wait(self, seconds: float) -> None:
        if self._connection.closed.wait(seconds):
            raise self._connection.closed_error()

    @contextmanager
    def _errors_mapped(self) -> Iterator[None]:
        """Turn gRPC's errors into CaptionError."""
        try:
            yield
        except (grpc.RpcError, ValueError) as error:
            # A channel that is closed raises ValueError.
            if self._connection.closed.is_set():
                raise self._connection.closed_error() from error
            if isinstance(error, grpc.RpcError):
                raise from_rpc_error(error) from error
            raise

    def __enter__(self) -> CaptionClient:
        """Give the client itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()


class _Many:
    """The pulling and the calls of one `caption_many`.

    Images are pulled by one thread, and a call is read by another, so that neither waits for the
    other, nor for the caller's loop. What they find they put into a queue as steps, which whoever
    iterates takes.
    """

    def __init__(
        self,
        stub: caption_pb2_grpc.CaptionServiceStub,
        connection: Connection,
        batch: Batch,
        images: Iterable[ImageInput],
        window: int,
    ) -> None:
        self.room = threading.Semaphore(checked_window(window))
        self._stub = stub
        self._connection = connection
        self._batch = batch
        self._steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._call: _ManyCall | None = None
        self._closed = False
        threading.Thread(
            target=self._pull, args=(each_image(images),), name="caption-many-images", daemon=True
        ).start()

    def advance(self) -> None:
        """Wait until something happens, take it in, and send what is to be sent.

        Raises:
            CaptionError: if no call will do better.
            Exception: what pulling raised.
        """
        if self._connection.closed.is_set():
            raise self._connection.closed_error()
        # Not before all that has happened is taken in, however long the caller has been away.
        step: Step = self._batch.expire
        with suppress(queue.Empty):
            step = self._steps.get(timeout=self._batch.seconds_idle())
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

    def close(self) -> None:
        self._closed = True
        self.room.release()
        if self._call is not None:
            self._call.close(answered=self._batch.is_answered)

    def _pull(self, images: Iterator[ImageInput]) -> None:
        while self.room.acquire() and not self._closed:
            try:
                image = next(images)
            except StopIteration:
                self._steps.put(self._batch.all_pulled)
                return
            except BaseException as error:
                self._steps.put(partial(_raise, error))
                return
            self._steps.put(self._batch.prepared(image))

    def _received(self, response: caption_pb2.CaptionManyResponse) -> None:
        self._steps.put(partial(self._batch.received, response))

    def _ended(self, error: CaptionError | None) -> None:
        self._steps.put(partial(self._end, error))

    def _end(self, error: CaptionError | None) -> None:
        self._call = None
        self._batch.call_ended(error)


class _ManyCall:
    """One CaptionMany call; what it hears it tells from a thread of its own."""

    def __init__(
        self,
        stub: caption_pb2_grpc.CaptionServiceStub,
        metadata: Metadata,
        received: Callable[[caption_pb2.CaptionManyResponse], None],
        ended: Callable[[CaptionError | None], None],
    ) -> None:
        self._received = received
        self._ended = ended
        self._outgoing: queue.SimpleQueue[caption_pb2.CaptionManyRequest | None] = (
            queue.SimpleQueue()
        )
        self._call = stub.CaptionMany(iter(self._outgoing.get, None), metadata=metadata)
        self._reading = threading.Thread(target=self._read, name="caption-many", daemon=True)
        self._reading.start()

    def send(self, message: caption_pb2.CaptionManyRequest) -> None:
        self._outgoing.put(message)

    def finish(self) -> None:
        """Send no more; the server ends the call when it has answered."""
        self._outgoing.put(None)

    def close(self, *, answered: bool) -> None:
        """End it, and well if all is answered."""
        self.finish()
        if answered:
            self._reading.join(GRACE_SECONDS)
        self._call.cancel()

    def _read(self) -> None:
        error: CaptionError | None = None
        try:
            for response in self._call:
                self._received(response)
        except grpc.RpcError as raised:
            error = from_rpc_error(raised)
        except Exception as raised:  # It must not end in silence: somebody waits for its word.
            error = CaptionError(grpc.StatusCode.INTERNAL, "INTERNAL", type(raised).__name__)
        self.finish()
        self._ended(error)


def _raise(error: BaseException) -> NoReturn:
    raise error
