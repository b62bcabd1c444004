"""The gateway as a whole: the gRPC server with its services, and the metrics beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import grpc
from captionserve.v1 import caption_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from captionserve_server.gateway.addresses import check_address
from captionserve_server.gateway.admission import Room
from captionserve_server.gateway.cache import AnswerCache
from captionserve_server.gateway.calls import Calls
from captionserve_server.gateway.canary import canary
from captionserve_server.gateway.caption_service import SERVICE_NAME, CaptionService, read_answer
from captionserve_server.gateway.conversion import caption_message, stream_message
from captionserve_server.gateway.credentials import CertificatePaths, ServerCertificates
from captionserve_server.gateway.decoder_client import DecoderClient, TimeLimit
from captionserve_server.gateway.identity import Identities
from captionserve_server.gateway.interceptors import (
    ErrorInterceptor,
    IdentityInterceptor,
    ObservingInterceptor,
)
from captionserve_server.gateway.many import Item, ManyCaptions
from captionserve_server.gateway.metrics import GatewayMetrics, MetricsServer
from captionserve_server.gateway.status import code_of
from captionserve_server.settings import Settings
from captionserve_server.tracing import Traces

# What an item of a call of many is called among the methods.
_ITEM = "CaptionMany.item"

# What health says of: the process, the server as a whole ("") and the service.
LIVE = "live"
_READY_NAMES = ("", SERVICE_NAME)

# How often files of certificates and tokens are looked at.
_REFRESH_SECONDS = 1.0


class Gateway:
    """Serves CaptionService, health and reflection, from `start` until `close`.

    Captions are answered while a Triton is connected; what is remembered of earlier answers is
    given without one, too.

    Attributes:
        address: host:port that is listened on; known after `start`.
        metrics_address: host:port of the metrics; known after `start`.
        health_address: host:port of the plaintext server with health alone; None without one.
        metrics: what is counted.
    """

    def __init__(self, settings: Settings) -> None:
        """Read certificates and tokens; nothing is opened before `start`.

        Raises:
            OSError: if a certificate, a key or the tokens cannot be read or used.
            TracingNotInstalledError: if traces are wanted, without what makes them.
        """
        self._settings = settings
        self._identities = Identities(settings.tokens)
        self._certificates: ServerCertificates | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self._certificates = ServerCertificates(
                CertificatePaths(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            )
        self.address = ""
        self.metrics_address = ""
        self.health_address: str | None = None
        self.metrics = GatewayMetrics()
        self._traces = Traces(settings.otlp_endpoint, "captionserve.gateway")
        self._show_expiry()
        self._draining = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def last_answer(self) -> float:
        """When the decoder last gave captions, by the event loop's clock; -inf if never."""
        return self._service.last_answer

    async def start(self) -> None:
        """Begin to listen, as NOT_SERVING.

        Raises:
            OSError: if an address cannot be listened on.
        """
        cache = AnswerCache(self._settings.cache_megabytes * 2**20)
        room = Room(
            calls=self._settings.max_concurrent_calls,
            calls_each=self._settings.max_concurrent_per_client,
            megabytes=self._settings.max_request_megabytes,
            megabytes_each=self._settings.max_request_megabytes_per_client,
        )
        self._health = health.aio.HealthServicer()
        self._service = CaptionService(cache, self.metrics, self._traces, self._settings)
        turns = self._service.turns
        self.metrics.show(
            {
                "admitted": lambda: room.all.calls,
                "request_bytes": lambda: room.all.bytes,
                "turns": lambda: turns.at_once,
                "working": lambda: turns.working,
                "waiting": lambda: turns.waiting,
                "cache_bytes": lambda: cache.used_bytes,
            }
        )
        for flag, listen in (
            ("--listen", self._settings.listen),
            ("--health-listen", self._settings.health_listen),
            ("--metrics-listen", self._settings.metrics_listen),
        ):
            if listen is not None:
                check_address(listen, flag)
        self._metrics_server = MetricsServer(self._settings.metrics_listen, self.metrics.registry)
        self.metrics_address = self._metrics_server.address
        self._calls = Calls(
            self._identities,
            room,
            max_message_bytes=self._settings.max_message_megabytes * 2**20,
            deadline_cap_seconds=self._settings.deadline_cap_seconds,
        )
        self._servers = [self._build_server()]
        try:
            self.address = _listen(self._servers[0], self._settings.listen, self._certificates)
            if self._settings.health_listen is not None:
                self._servers.append(self._health_server())
                self.health_address = _listen(self._servers[1], self._settings.health_listen, None)
        except OSError:
            await self.close()
            raise
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(False)
        for server in self._servers:
            await server.start()
        self._refreshing = asyncio.create_task(self._refresh_now_and_then())

    async def connect(
        self, triton_address: str, versions: Sequence[int], seconds: float
    ) -> DecoderClient | None:
        """Have captions answered by a Triton, once each of its versions has given one.

        Args:
            triton_address: its host:port.
            versions: of the model; the newest is the default.
            seconds: how long each may take for its first caption.

        Returns:
            whom was asked until now, and may still be answering.

        Raises:
            CaptionServeError: if a version gives none; then nothing has changed.
        """
        decoder = DecoderClient(triton_address)
        try:
            descriptions = []
            for version in versions:
                description = await decoder.describe(version)
                time_limit = TimeLimit(seconds, seconds)
                read_answer(await decoder.caption(canary(description), version, time_limit))
                descriptions.append(description)
        except BaseException:
            await decoder.close()
            raise
        former = self._service.connect(decoder, descriptions)
        await self.set_serving(True)
        return former

    async def disconnect(self) -> DecoderClient | None:
        """Say NOT_SERVING; calls in flight, and new ones, fail as ModelUnavailableError.

        Returns:
            whom was asked until now, to be closed.
        """
        await self.set_serving(False)
        return self._service.disconnect()

    async def prove(self, seconds: float) -> None:
        """Have a caption made, past the queue.

        Args:
            seconds: how long it may take.

        Raises:
            CaptionServeError: if it failed, or was not there in time.
        """
        await self._service.prove(TimeLimit(seconds, seconds))

    async def set_serving(self, serving: bool) -> None:
        """Say through the health service whether captions can be answered; not after `drain`."""
        response = health_pb2.HealthCheckResponse
        ready = serving and not self._draining.is_set()
        for name in _READY_NAMES:
            await self._health.set(name, response.SERVING if ready else response.NOT_SERVING)
        self.metrics.serving.set(ready)

    def refresh(self) -> None:
        """Take in certificates and tokens whose files have changed."""
        self._identities.refresh()
        if self._certificates is not None:
            self._certificates.refresh()
            self._show_expiry()

    async def wait_idle(self) -> None:
        """Wait until no call is in flight."""
        await self._calls.wait_idle()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Report NOT_SERVING, wait for balancers, refuse new calls, let those in flight finish.

        Calls that are still in flight after the time for it are ended.

        Args:
            hurry: when set, nothing is waited for any more.
        """
        self._draining.set()
        await self.set_serving(False)
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait([hurrying], timeout=self._settings.balancer_seconds)
        stopping = asyncio.create_task(self._servers[0].stop(self._settings.drain_seconds))
        idle = asyncio.create_task(self.wait_idle())
        await asyncio.wait([stopping, idle, hurrying], return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurrying):
            task.cancel()
        # Whoever watches the health service would stay to the end of the time.
        await self._servers[0].stop(None)
        await stopping

    async def _refresh_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            self.refresh()

    def _show_expiry(self) -> None:
        if self._certificates is not None:
            self.metrics.certificate_expiry.set(self._certificates.expires.timestamp())

    async def close(self) -> None:
        """End whatever is still in flight, and close everything."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        for server in self._servers:
            await server.stop(None)
        decoder = self._service.disconnect()
        if decoder is not None:
            await decoder.close()
        await asyncio.to_thread(self._metrics_server.stop)
        await asyncio.to_thread(self._traces.close)

    def _build_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            # The first is the outermost.
            interceptors=(
                ObservingInterceptor(SERVICE_NAME, self.metrics, self._traces),
                ErrorInterceptor(),
                IdentityInterceptor(reflection.SERVICE_NAME, self._identities),
            ),
            options=server_options(self._settings),
        )
        server.add_generic_rpc_handlers((self._caption_handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _caption_handlers(self) -> grpc.GenericRpcHandler:
        calls, service = self._calls, self._service

        async def answer_item(item: Item, identity: str) -> caption_pb2.CaptionResponse:
            with self.metrics.call(_ITEM) as record:
                try:
                    with calls.item(identity, item.size, item.seconds) as call:
                        return await service.caption(item.message(), call)
                except BaseException as error:
                    record.code = code_of(error)
                    raise

        def caption_many(
            requests: AsyncIterator[bytes], identity: str
        ) -> AsyncIterator[caption_pb2.CaptionManyResponse]:
            return ManyCaptions(
                requests,
                partial(answer_item, identity=identity),
                window=self._settings.window,
                message_bytes=self._settings.max_message_megabytes * 2**20,
                draining=self._draining,
                seconds=self._settings.connection_age_seconds,
            ).responses()

        handlers = {
            "CaptionMany": calls.many(caption_many),
            "GetModels": calls.unary(caption_pb2.GetModelsRequest.FromString, service.models),
            "Caption": calls.unary(caption_message, service.caption),
            "StreamCaption": calls.streaming(stream_message, service.stream_caption),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def _health_server(self) -> grpc.aio.Server:
        """For probes, which speak plaintext only and should not wait behind calls."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server


def _listen(server: grpc.aio.Server, listen: str, certificates: ServerCertificates | None) -> str:
    """Bind, and give the address with the port that was really taken."""
    try:
        if certificates is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, certificates.credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}") from error
    host, _, _ = listen.rpartition(":")
    return f"{host}:{port}"


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """How the server treats connections."""
    max_message_bytes = settings.max_message_megabytes * 2**20
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.server_handshake_timeout_ms", int(1000 * settings.handshake_seconds)),
        ("grpc.keepalive_time_ms", int(1000 * settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(1000 * settings.keepalive_seconds)),
        # Without it newer versions of gRPC wait a minute for the answer to a ping all the same.
        ("grpc.http2.ping_timeout_ms", int(1000 * settings.keepalive_seconds)),
        ("grpc.max_connection_idle_ms", int(1000 * settings.connection_idle_seconds)),
        ("grpc.max_connection_age_ms", int(1000 * settings.connection_age_seconds)),
        # A call of many that begins with the connection's last second ends by itself in this time.
        (
            "grpc.max_connection_age_grace_ms",
            int(1000 * (settings.connection_age_seconds + settings.deadline_cap_seconds)),
        ),
        # Clients ping on connections with calls, so as to notice one that is dead.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # Two gateways on one port would each get half of the calls, unnoticed.
        ("grpc.so_reuseport", 0),
    ]
