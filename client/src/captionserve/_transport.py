"""What both clients tell gRPC: channel options, the retry policy and deadlines."""

from __future__ import annotations

import json
import math

import grpc

from captionserve._errors import CaptionError
from captionserve._images import ImageInput, image_message
from captionserve._options import GenerationOptions, to_proto
from captionserve.v1 import caption_pb2

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# A stream's request is a message around it, of at most 8 bytes more.
_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 8
# A server that restarts is found again within this time; gRPC's own limit is two minutes.
_MAX_RECONNECT_MILLISECONDS = 5_000

_SERVICE_CONFIG = json.dumps(
    {
        # Several addresses behind one name share the calls.
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": "captionserve.v1.CaptionService"}],
                # Captioning twice does no harm. Only UNAVAILABLE: retrying what is refused for
                # overload would feed the overload.
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        # Stops retrying while most calls fail.
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
    }
)


def channel_options() -> list[tuple[str, int | str]]:
    """The channel's options, the same for both clients."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # gRPC silently stops retrying what does not fit here; its default is less than a photo.
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MILLISECONDS),
        # The target alone says where calls go, not the environment.
        ("grpc.enable_http_proxy", 0),
    ]


def checked_timeout(seconds: float) -> float:
    """Give the timeout back.

    Raises:
        ValueError: if it is not a positive, finite number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"timeout must be a positive number of seconds, is {seconds}")
    return seconds


def build_request(
    image: ImageInput, options: GenerationOptions | None, *, bypass_cache: bool = False
) -> caption_pb2.CaptionRequest:
    """Read and encode the image and put the options beside it.

    Raises:
        CaptionError: IMAGE_TOO_LARGE, if it does not fit into a message; otherwise as
            `image_message` does.
    """
    request = caption_pb2.CaptionRequest(
        image=image_message(image),
        options=None if options is None else to_proto(options),
        bypass_cache=bypass_cache,
    )
    size = request.ByteSize()
    if size > _MAX_REQUEST_BYTES:
        # gRPC would say RESOURCE_EXHAUSTED, as for an overload, and nothing of the image.
        raise CaptionError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "IMAGE_TOO_LARGE",
            f"the image takes {size} bytes as it is sent, at most {_MAX_REQUEST_BYTES} fit: "
            "make it smaller, or give it as a JPEG file",
        )
    return request


def build_stream_request(
    image: ImageInput, options: GenerationOptions | None
) -> caption_pb2.StreamCaptionRequest:
    """The same for a stream."""
    return caption_pb2.StreamCaptionRequest(request=build_request(image, options))
