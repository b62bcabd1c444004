"""What the client does with a connection is what the server allows."""

from __future__ import annotations

from typing import Any

from captionserve._transport import channel_options
from captionserve_server.gateway.server import server_options

from tests.unit.gateway.harness import settings_of


def test_pings_and_silence_are_allowed() -> None:
    client: dict[str, Any] = dict(channel_options())
    server = dict(server_options(settings_of()))
    # One that pings more often is sent away with ENHANCE_YOUR_CALM.
    assert (
        client["grpc.keepalive_time_ms"] >= server["grpc.http2.min_ping_interval_without_data_ms"]
    )
    # Without calls the server allows a ping in two hours.
    assert not client.get("grpc.keepalive_permit_without_calls")
    assert client["grpc.client_idle_timeout_ms"] < server["grpc.max_connection_idle_ms"]


def test_messages_of_one_size_are_sent_and_read() -> None:
    client: dict[str, Any] = dict(channel_options())
    server = dict(server_options(settings_of()))
    for name in ("grpc.max_send_message_length", "grpc.max_receive_message_length"):
        assert client[name] == server[name]
