"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Iterator
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
    ) -> None:
        """Prepare a channel; it connects with the first call.

        Args:
            target: host:port of the service, or a target as gRPC names it, such as
                dns:///captions:9000, which spreads calls over all addresses of the name.
            timeout: seconds a call may take when it does not say otherwise.
            credentials: for TLS, see `tls_credentials`; without them nothing is encrypted.
            token: says who calls, a text or a callable that gives it; needs TLS, unless the service
                is on this machine.

        Raises:
            ValueError: if the timeout is not a positive, finite number, or the token would travel
                in the clear.
        """
        self._connection = Connection.of(target, timeout, credentials, token)
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
    ) -> CaptionResult:
        """Describe one image.

        Args:
            image: a path, an encoded image as bytes, a binary file object, a PIL image, a uint8
                array of shape (height, width, 3), or a float32 or float64 array or torch tensor of
                shape (3, height, width) as the checkpoint's own image processor makes it.
            options: how to decode; None leaves everything to the server.
            timeout: seconds the call may take, retries included; None takes the client's.
            bypass_cache: have the answer computed anew, whatever the server remembers.

        Raises:
            CaptionError: if the call failed, or an option cannot be sent.
            TypeError: if the image has the wrong type.
            ValueError: if the image or the timeout cannot be sent.
            OSError: if the image's file cannot be read.
        """
        attempts = self._connection.attempts(timeout)
        request = build_request(image, options, bypass_cache=bypass_cache)
        while True:
            try:
                with self._errors_mapped():
                    response = self._stub.Caption(
                        request,
                        timeout=attempts.seconds_left,
                        metadata=self._connection.metadata(request.ByteSize()),
                    )
                return from_proto(response)
            except CaptionError as error:
                self._wait(attempts.delay_after(error))

    def caption_stream(
        self,
        image: ImageInput,
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        bypass_cache: bool = False,
    ) -> Generator[CaptionUpdate, None, None]:
        """Describe one image and yield the words as they become certain, at last the result.

        The words of greedy search and sampling come one by one, those of beam search when all beams
        that are left share them. Closing the generator, which leaving a loop over it does unless
        somebody else holds it, ends the work on the server. Errors are raised from within the loop;
        once a word was given, a stream that breaks is not tried again. Streams are not remembered,
        so that bypass_cache changes nothing. Arguments and errors are those of `caption`.
        """
        attempts = self._connection.attempts(timeout)
        request = caption_pb2.StreamCaptionRequest(
            request=build_request(image, options, bypass_cache=bypass_cache)
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
                        for response in call:
                            begun = True
                            yield update_from_proto(response)
                        return
                    finally:
                        call.cancel()
            except CaptionError as error:
                if begun:
                    raise
                self._wait(attempts.delay_after(error))

    def close(self) -> None:
        """Close the connection; calls in flight, and later ones, fail with CLIENT_CLOSED."""
        self._connection.closed.set()
        self._channel.close()

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
