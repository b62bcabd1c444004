"""The gateway as a whole: the gRPC server with its services, and the metrics beside it."""

from __future__ import annotations

import asyncio

import grpc
from captionserve.v1 import caption_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from captionserve_server.gateway.cache import AnswerCache
from captionserve_server.gateway.caption_service import SERVICE_NAME, CaptionService
from captionserve_server.gateway.config import GatewayConfig
from captionserve_server.gateway.decoder_client import DecoderClient
from captionserve_server.gateway.interceptors import ErrorInterceptor, MetricsInterceptor
from captionserve_server.gateway.metrics import GatewayMetrics, MetricsServer

# "" stands for the server as a whole.
_HEALTH_NAMES = ("", SERVICE_NAME)


class Gateway:
    """Serves CaptionService, health and reflection, from `start` until `stop`.

    Attributes:
        address: host:port that is listened on; known after `start`.
        metrics_address: host:port of the metrics; known after `start`.
    """

    def __init__(self, config: GatewayConfig) -> None:
        """Keep the settings; nothing is opened before `start`."""
        self._config = config
        self.address = ""
        self.metrics_address = ""

    async def start(self) -> str:
        """Begin to serve, as SERVING.

        Returns:
            host:port that is listened on.

        Raises:
            OSError: if an address cannot be listened on.
        """
        metrics = GatewayMetrics()
        self._metrics_server = MetricsServer(self._config.metrics_listen, metrics.registry)
        self.metrics_address = self._metrics_server.address
        self._decoder = DecoderClient(self._config.triton_address)
        cache = AnswerCache(self._config.cache_megabytes * 2**20)
        metrics.cache_bytes.set_function(lambda: cache.used_bytes)
        self._health = health.aio.HealthServicer()
        self._service = CaptionService(
            self._decoder,
            cache,
            metrics,
            max_concurrent_calls=self._config.max_concurrent_calls,
            deadline_cap_seconds=self._config.deadline_cap_seconds,
        )
        self._server = self._build_server(metrics)
        try:
            self.address = _listen(self._server, self._config.listen)
        except OSError:
            await self._close()
            raise
        await self.set_serving(True)
        await self._server.start()
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """Say through the health service whether captions can be answered; `stop` ends that."""
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if serving else response.NOT_SERVING
        for name in _HEALTH_NAMES:
            await self._health.set(name, status)

    def forget_description(self) -> None:
        """Have the decoder asked anew what it is.

        To be called when Triton has taken in another version; otherwise the first computed answer
        of that version does it, and remembered ones of the old version are given until then.
        """
        self._service.forget_description()

    async def stop(self) -> None:
        """Report NOT_SERVING, refuse new calls, let those in flight finish, and close everything.

        Calls that are still in flight after the grace period are cancelled.
        """
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(self._config.grace_seconds))
        idle = asyncio.create_task(self._service.wait_idle())
        await asyncio.wait([stopping, idle], return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        # Whoever watches the health service would stay to the end of the grace period.
        await self._server.stop(None)
        await stopping
        await self._close()

    async def _close(self) -> None:
        await self._decoder.close()
        await asyncio.to_thread(self._metrics_server.stop)

    def _build_server(self, metrics: GatewayMetrics) -> grpc.aio.Server:
        server = grpc.aio.server(
            # The first is the outermost.
            interceptors=(MetricsInterceptor(SERVICE_NAME, metrics), ErrorInterceptor()),
            options=_server_options(self._config),
        )
        caption_pb2_grpc.add_CaptionServiceServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server


def _listen(server: grpc.aio.Server, listen: str) -> str:
    """Bind, and give the address with the port that was really taken."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}") from error
    host, _, _ = listen.rpartition(":")
    return f"{host}:{port}"


def _server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.max_connection_idle_ms", int(1000 * config.connection_idle_seconds)),
        ("grpc.max_connection_age_ms", int(1000 * config.connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", int(1000 * config.deadline_cap_seconds)),
        # Two gateways on one port would each get half of the calls, unnoticed.
        ("grpc.so_reuseport", 0),
    ]
