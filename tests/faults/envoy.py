"""Envoy before several replicas, told which there are as Kubernetes tells a Gateway."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.served import WAIT_SECONDS, Ports, wait_until

_TYPE = "type.googleapis.com/envoy."
_CLUSTER = "captionserve"
_PLAINTEXT = "plaintext"


class Tls(NamedTuple):
    """Files of who speaks TLS to both sides."""

    ca: Path
    certificate: Path
    key: Path


class Envoy:
    """Envoy, which gives each call to one of the replicas that it has been told of.

    It asks their health itself, in plaintext, and speaks TLS to them and to callers. It makes no
    call again, and ends none for how long it takes.

    Attributes:
        target: where callers find it; known once it is served.
    """

    def __init__(self, folder: Path, name: str, ports: Ports, tls: Tls) -> None:
        """Prepare.

        Args:
            folder: for its files.
            name: that the replicas' certificates must have.
            ports: of each replica.
            tls: what it trusts, and what it shows to callers.
        """
        self.target = ""
        self._folder = folder
        self._ports = ports
        self._endpoints = folder / "endpoints.json"
        self._configuration = folder / "envoy.json"
        self._configuration.write_text(json.dumps(_bootstrap(name, self._endpoints, tls)))

    @contextmanager
    def served(self, executable: Path) -> Iterator[None]:
        """Balance while the block runs."""
        self._write(())
        log, admin = self._folder / "envoy.log", self._folder / "envoy.admin"
        command = [
            *(str(executable), "--config-path", str(self._configuration), "--disable-hot-restart"),
            *("--admin-address-path", str(admin), "--concurrency", "1", "--log-level", "warning"),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_until(lambda: (admin.exists() and admin.read_text()) or process.poll() is not None)
            assert process.poll() is None, log.read_text()[-4000:]
            self._admin = admin.read_text()
            wait_until(lambda: self._asked("listeners").get("listener_statuses"))
            (listener,) = self._asked("listeners")["listener_statuses"]
            self.target = "127.0.0.1:{port_value}".format(
                **listener["local_address"]["socket_address"]
            )
            yield
        finally:
            process.terminate()
            try:
                process.wait(WAIT_SECONDS)
            finally:
                process.kill()

    def tell(self, hosts: Collection[str]) -> None:
        """Say which replicas there are, and wait until it gives calls to them and no others."""
        self._write(hosts)
        wait_until(lambda: self.healthy() == set(hosts))

    def healthy(self) -> set[str]:
        """The replicas that it gives calls to."""
        return {
            host
            for host, status in self._hosts().items()
            if status["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def connections(self) -> dict[str, int]:
        """How many connections it has made to each replica until now."""
        return {host: self._statistic(status, "cx_total") for host, status in self._hosts().items()}

    def _statistic(self, status: dict[str, Any], name: str) -> int:
        (found,) = [each for each in status["stats"] if each["name"] == name]
        return int(found.get("value", 0))

    def _hosts(self) -> dict[str, dict[str, Any]]:
        (cluster,) = self._asked("clusters")["cluster_statuses"]
        return {
            each["address"]["socket_address"]["address"]: each
            for each in cluster.get("host_statuses", [])
        }

    def _asked(self, what: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self._admin}/{what}?format=json") as answer:
            said: dict[str, Any] = json.load(answer)
            return said

    def _write(self, hosts: Collection[str]) -> None:
        endpoints = [
            {
                "endpoint": {
                    "address": _address(host, self._ports.grpc),
                    "health_check_config": {"port_value": self._ports.health},
                }
            }
            for host in hosts
        ]
        assignment = {
            "@type": _TYPE + "config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": _CLUSTER,
            "endpoints": [{"lb_endpoints": endpoints}],
        }
        draft = self._endpoints.with_suffix(".draft")
        draft.write_text(json.dumps({"resources": [assignment]}))
        # Envoy looks at what is moved there, not at what is written to.
        draft.replace(self._endpoints)


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _bootstrap(name: str, endpoints: Path, tls: Tls) -> dict[str, Any]:
    """Envoy's configuration."""
    route = {"cluster": _CLUSTER, "timeout": "0s"}
    connections = {
        "@type": _TYPE
        + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "callers",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": _CLUSTER,
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": _TYPE + "extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "callers",
        "address": _address("127.0.0.1", 0),
        "filter_chains": [
            {
                "transport_socket": _to_callers(tls),
                "filters": [{"name": "connections", "typed_config": connections}],
            }
        ],
    }
    return {
        "admin": {"address": _address("127.0.0.1", 0)},
        "node": {"id": "rollout", "cluster": "rollout"},
        "static_resources": {
            "listeners": [listener],
            "clusters": [_cluster(name, endpoints, tls)],
        },
    }


def _to_callers(tls: Tls) -> dict[str, Any]:
    pair = {
        "certificate_chain": {"filename": str(tls.certificate)},
        "private_key": {"filename": str(tls.key)},
    }
    return {
        "name": "tls",
        "typed_config": {
            "@type": _TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {"tls_certificates": [pair], "alpn_protocols": ["h2"]},
        },
    }


def _cluster(name: str, endpoints: Path, tls: Tls) -> dict[str, Any]:
    to_replicas = {
        "@type": _TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": name,
        "common_tls_context": {
            "validation_context": {
                "trusted_ca": {"filename": str(tls.ca)},
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": name}}],
            }
        },
    }
    in_plaintext = {
        "@type": _TYPE + "extensions.transport_sockets.raw_buffer.v3.RawBuffer",
    }
    http2 = {
        "@type": _TYPE + "extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "name": _CLUSTER,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"path_config_source": {"path": str(endpoints)}}},
        # In turns, whatever is in flight: with few callers LEAST_REQUEST balances as chance has it.
        "lb_policy": "ROUND_ROBIN",
        # Who is not among the endpoints any more gets no call, however well it is.
        "ignore_health_on_host_removal": True,
        "health_checks": [
            {
                "grpc_health_check": {},
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "timeout": "5s",
                "healthy_threshold": 1,
                "unhealthy_threshold": 1,
                "transport_socket_match_criteria": {_PLAINTEXT: True},
            }
        ],
        "transport_socket": {"name": "tls", "typed_config": to_replicas},
        # The port for health alone speaks plaintext.
        "transport_socket_matches": [
            {
                "name": _PLAINTEXT,
                "match": {_PLAINTEXT: True},
                "transport_socket": {"name": _PLAINTEXT, "typed_config": in_plaintext},
            }
        ],
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
        },
    }
