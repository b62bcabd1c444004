"""A real gRPC server with a servicer that does what a test tells it, and keeps what it was sent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import NoReturn

import grpc
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

WAIT_SECONDS = 20.0
# Longer than a test waits, so that it does not take the servicer's patience for the caller's leave.
_HOLD_SECONDS = 2 * WAIT_SECONDS

Stream = Callable[
    [caption_pb2.StreamCaptionRequest, grpc.ServicerContext],
    Iterator[caption_pb2.StreamCaptionResponse],
]
Answer = Callable[[caption_pb2.CaptionRequest, grpc.ServicerContext], caption_pb2.CaptionResponse]

Many = Callable[
    [Iterator[caption_pb2.CaptionManyRequest], grpc.ServicerContext],
    Iterator[caption_pb2.CaptionManyResponse],
]


def window(items: int = 4, message_bytes: int = 0) -> caption_pb2.CaptionManyResponse:
    announced = caption_pb2.Window(items=items, message_bytes=message_bytes)
    return caption_pb2.CaptionManyResponse(window=announced)


def drain() -> caption_pb2.CaptionManyResponse:
    return caption_pb2.CaptionManyResponse(drain=caption_pb2.Drain())


def result_of(item: caption_pb2.CaptionManyRequest) -> caption_pb2.CaptionManyResponse:
    """A caption that repeats the image."""
    response = good_response()
    response.captions[0].text = item.request.image.encoded.decode()
    return caption_pb2.CaptionManyResponse(
        result=caption_pb2.ItemResult(id=item.id, response=response)
    )


def failure_of(
    item: caption_pb2.CaptionManyRequest, code: grpc.StatusCode, *details: Message
) -> caption_pb2.CaptionManyResponse:
    """An item's own error."""
    status = status_pb2.Status.FromString(rich_status(code, *details))
    return caption_pb2.CaptionManyResponse(result=caption_pb2.ItemResult(id=item.id, error=status))


def answer_in_turn(
    requests: Iterator[caption_pb2.CaptionManyRequest], context: grpc.ServicerContext
) -> Iterator[caption_pb2.CaptionManyResponse]:
    """Each item as it comes."""
    yield window()
    for item in requests:
        yield result_of(item)


def good_response() -> caption_pb2.CaptionResponse:
    best = caption_pb2.Caption(
        text="a red apple",
        score=-0.5,
        token_ids=[5, 6, 2],
        token_logprobs=[-0.25, -0.25, -0.5],
        finish_reason=caption_pb2.FINISH_REASON_EOS,
        token_texts=["a red", " apple", ""],
        confidence=0.75,
        words=[
            caption_pb2.Word(text="red", first_token=0, tokens=1, confidence=0.875, grounding=2.0),
            caption_pb2.Word(text="apple", first_token=1, tokens=1, confidence=0.5, grounding=4.0),
        ],
        token_groundings=[2.0, 4.0, 0.0],
        grounding=2.0,
        needs_review=True,
        review_reasons=[caption_pb2.REVIEW_REASON_LOW_CONFIDENCE],
        attention=caption_pb2.Attention(rows=1, cols=2, values=[0.5, 0.25, 0.0, 1.0, 0.125, 0.125]),
    )
    second = caption_pb2.Caption(
        text="an apple",
        score=-0.75,
        token_ids=[7],
        token_logprobs=[-0.75],
        finish_reason=caption_pb2.FINISH_REASON_DEADLINE,
        token_texts=["an apple"],
        confidence=0.5,
        degenerate=True,
        words=[caption_pb2.Word(text="apple", first_token=0, tokens=1, confidence=0.25)],
    )
    return caption_pb2.CaptionResponse(captions=[best, second], model_version=3, cached=True)


def good_stream() -> list[caption_pb2.StreamCaptionResponse]:
    """The words of `good_response` one by one, then the whole."""
    parts = (("a red", 5), (" apple", 6), ("", 2))
    return [
        *(
            caption_pb2.StreamCaptionResponse(
                part=caption_pb2.CaptionPart(text=text, token_ids=[token])
            )
            for text, token in parts
        ),
        caption_pb2.StreamCaptionResponse(response=good_response()),
    ]


def rich_status(code: grpc.StatusCode, *details: Message) -> bytes:
    """A google.rpc.Status as it travels."""
    status = status_pb2.Status(code=code.value[0], message="a sentence")
    for detail in details:
        status.details.add().Pack(detail)
    serialized: bytes = status.SerializeToString()
    return serialized


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, status: bytes) -> NoReturn:
    """End the call with a status beside gRPC's own."""
    context.set_trailing_metadata((("grpc-status-details-bin", status),))
    context.abort(code, "a sentence")


class RecordingServicer(caption_pb2_grpc.CaptionServiceServicer):
    """Answers with `answer` and `stream`; by default with `good_response` and `good_stream`."""

    def __init__(self) -> None:
        self.requests: list[caption_pb2.CaptionRequest] = []
        self.seconds_left: list[float | None] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.ended = threading.Event()
        self.answer: Answer = lambda request, context: good_response()
        self.stream: Stream = lambda request, context: iter(good_stream())
        self.many: Many = answer_in_turn
        self.models = caption_pb2.GetModelsResponse()

    def Caption(  # noqa: N802
        self, request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        return self.answer(request, context)

    def StreamCaption(  # noqa: N802
        self, request: caption_pb2.StreamCaptionRequest, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        self.requests.append(request.request)
        self.seconds_left.append(context.time_remaining())
        yield from self.stream(request, context)

    def CaptionMany(  # noqa: N802
        self, requests: Iterator[caption_pb2.CaptionManyRequest], context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.CaptionManyResponse]:
        self.metadata.append(dict(context.invocation_metadata()))
        yield from self.many(requests, context)

    def GetModels(  # noqa: N802
        self, request: caption_pb2.GetModelsRequest, context: grpc.ServicerContext
    ) -> caption_pb2.GetModelsResponse:
        return self.models

    def answer_each(
        self, requests: Iterator[caption_pb2.CaptionManyRequest], context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.CaptionManyResponse]:
        """Each item as a call of its own."""
        yield window()
        for item in requests:
            self.requests.append(item.request)
            response = self.answer(item.request, context)
            yield caption_pb2.CaptionManyResponse(
                result=caption_pb2.ItemResult(id=item.id, response=response)
            )

    def one_part_and_no_more(
        self, request: caption_pb2.StreamCaptionRequest, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        """A stream that stops after its first part, until the caller has gone."""
        # Before the part: gRPC does not go on with a stream whose caller has gone.
        self.tell_of_the_end(context)
        yield good_stream()[0]
        self.ended.wait(_HOLD_SECONDS)

    def wait_until_gone(
        self, request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        """An answer that never comes: ends when the caller has gone."""
        self.tell_of_the_end(context)
        self.ended.wait(_HOLD_SECONDS)
        return good_response()

    def tell_of_the_end(self, context: grpc.ServicerContext) -> None:
        """Set `ended` when the call has ended, or at once if it has."""
        if not context.add_callback(self.ended.set):
            self.ended.set()


@contextmanager
def caption_server(listen: str = "127.0.0.1:0") -> Iterator[tuple[str, RecordingServicer]]:
    """Serve, on a free port if none is given; gives host:port and the servicer."""
    servicer = RecordingServicer()
    server = grpc.server(
        futures.ThreadPoolExecutor(2),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    caption_pb2_grpc.add_CaptionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(listen)
    server.start()
    try:
        yield f"{listen.rpartition(':')[0]}:{port}", servicer
    finally:
        server.stop(None).wait()


def unused_address() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return f"127.0.0.1:{port}"
