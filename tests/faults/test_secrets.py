"""What a service says, everywhere: no token, and of itself nothing that helps an attacker."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.gateway.tokens import create_token, revoke_tokens
from google.protobuf.duration_pb2 import Duration

from tests.certificates import CertificateFiles
from tests.collector import Collector, collecting
from tests.damaged_images import damaged_files
from tests.faults.served import WAIT_SECONDS, Served, serving, wait_until
from tests.pictures import png
from tests.reference import picture

NAME = "projected"
SERVICE = "/captionserve.v1.CaptionService/"
# What names the insides of a program: paths, sources, modules, objects, exceptions, traces.
INSIDES = re.compile(
    rb"/(?!captionserve\.v1\.)\w+[/.]\w|\.py\b|\w+\.\w+\.\w+|Traceback|\w(?:Error|Exception)\b"
    rb"|0x[0-9a-f]{4}|captionserve_server|numpy|onnx|PIL|tritonclient|protobuf|line \d"
)
# Names that gRPC's own sentences and our details consist of.
PUBLIC = re.compile(
    rb"captionserve\.v1\.\w+|type\.googleapis\.com/google\.rpc\.\w+|127\.0\.0\.1:\d+"
)


@dataclass
class Guarded:
    """A service with TLS and tokens, and all that its callers have been told."""

    served: Served
    files: CertificateFiles
    folder: Path
    token: str
    arguments: tuple[str, ...]
    collector: Collector
    told: list[bytes] = field(default_factory=list)

    def call(self, method: str, request: bytes, **how: Any) -> grpc.StatusCode:
        """How a call of these bytes ends; what its caller is told is kept."""
        metadata = how.pop("metadata", (("authorization", f"Bearer {self.token}"),))
        timeout = how.pop("timeout", WAIT_SECONDS)
        options = [("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)]
        target, credentials = self.served.report["grpc"], self.files.credentials()
        with grpc.secure_channel(target, credentials, options=options) as channel:
            begin: Any = channel.stream_stream(SERVICE + method)
            call = begin(iter([request]), timeout=timeout, metadata=metadata)
            try:
                self.told += call
            except grpc.RpcError:
                self.told.append(call.details().encode())
                for key, value in call.trailing_metadata():
                    self.told.append(key.encode())
                    self.told.append(value if isinstance(value, bytes) else value.encode())
            code: grpc.StatusCode = call.code()
            return code

    def places(self) -> Mapping[str, bytes]:
        """All that can be read of the service, by where."""
        wait_until(lambda: self.collector.spans)
        report = self.served.report
        gateway = psutil.Process(report["pids"]["gateway"])
        family = [gateway, *gateway.children(recursive=True)]
        proc = [Path("/proc", str(process.pid)) for process in family]
        return {
            "what callers are told": b"\n".join(self.told),
            "log": self.served.log.read_bytes(),
            "Triton's log": (self.folder / "triton.log").read_bytes(),
            "ready file": self.served.ready_file.read_bytes(),
            "metrics": page(report["metrics"]),
            "traces": b"\n".join(span.SerializeToString() for span in self.collector.spans),
            "Triton's metrics": page(report["triton_metrics"]),
            "tokens": self.files.tokens.read_bytes(),
            "command lines": b"\n".join((one / "cmdline").read_bytes() for one in proc),
            "environments": b"\n".join((one / "environ").read_bytes() for one in proc),
            "--print-config": self.command("serve", *self.arguments, "--print-config"),
            "token list": self.command("token", "list", "--tokens", str(self.files.tokens)),
        }

    def command(self, *arguments: str) -> bytes:
        """What a command prints."""
        command = (sys.executable, "-m", "captionserve_server.cli.main", *arguments)
        return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def page(address: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        content: bytes = answer.read()
        return content


def found(secret: str, places: Mapping[str, bytes]) -> set[str]:
    """Where a secret can be read, whole or its larger part."""
    return {name for name, text in places.items() if secret[8:40].encode() in text}


@pytest.fixture(scope="module", params=["text", "json"])
def guarded(
    request: pytest.FixtureRequest,
    model_repository: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    files = CertificateFiles(folder)
    token = create_token(files.tokens, "alice")
    arguments: tuple[str, ...] = (
        *("--tls-certificate", str(files.certificate), "--tls-key", str(files.key)),
        *("--tokens", str(files.tokens), "--triton-log", str(folder / "triton.log")),
        *("--log-format", request.param, "--model-repository", str(model_repository(NAME))),
    )
    with collecting() as (collector, endpoint):
        arguments += ("--otlp-endpoint", endpoint)
        with serving(model_repository(NAME), folder, *arguments) as served:
            yield Guarded(served, files, folder, token, arguments, collector)


def request_of(image: bytes, **options: Any) -> caption_pb2.CaptionRequest:
    return caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=image),
        options=caption_pb2.GenerationOptions(**options),
        bypass_cache=True,
    )


def test_a_token_is_nowhere_to_be_read(guarded: Guarded) -> None:
    good = request_of(png(picture(1))).SerializeToString()
    wrong, unreadable = (f"cst_{secrets.token_urlsafe(32)}" for _ in range(2))
    revoked = create_token(guarded.files.tokens, "bob")
    guarded.served.process.send_signal(signal.SIGHUP)
    as_bob = {"metadata": (("authorization", f"Bearer {revoked}"),)}
    wait_until(lambda: guarded.call("Caption", good, **as_bob) is grpc.StatusCode.OK)
    revoke_tokens(guarded.files.tokens, "bob")
    wait_until(lambda: guarded.call("Caption", good, **as_bob) is not grpc.StatusCode.OK)
    for value in (wrong, f"Bearer {wrong}", f"Basic {wrong}", f"Bearer {wrong} {guarded.token}"):
        code = guarded.call("Caption", good, metadata=(("authorization", value),))
        assert code is grpc.StatusCode.UNAUTHENTICATED
    for method in ("Caption", "StreamCaption", "CaptionMany", "GetModels", "Nothing"):
        guarded.call(method, b"\xff")
    crash(guarded, good)
    # A token that was written where its hash should be.
    tokens = guarded.files.tokens.read_text()
    guarded.files.tokens.write_text(f"{tokens}carol {unreadable}\n")
    wait_until(lambda: b"the new tokens are refused" in guarded.served.log.read_bytes())
    guarded.files.tokens.write_text(tokens)
    places = guarded.places()
    assert all(places.values()), [name for name, text in places.items() if not text]
    for secret in (guarded.token, revoked, wrong, unreadable, guarded.files.key.read_text()[40:]):
        assert found(secret, places) == set()


def crash(guarded: Guarded, request: bytes) -> None:
    """Triton is killed while it works; until it is there again."""
    before = guarded.served.report["pids"]["triton"]
    guarded.served.triton.kill()
    assert guarded.call("Caption", request) is grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: guarded.served.report["pids"]["triton"] != before)


@pytest.mark.parametrize("guarded", ["text"], indirect=True)
def test_a_token_that_is_somewhere_is_found(guarded: Guarded) -> None:
    # The control: the test above must be able to fail.
    planted = secrets.token_hex(24)
    headers = (("authorization", f"Bearer {guarded.token}"), ("x-request-id", planted))
    guarded.call("Caption", request_of(b"no image").SerializeToString(), metadata=headers)
    guarded.told.append(planted.encode())
    places = guarded.places()
    assert found(planted, places) == {"log", "what callers are told"}
    # What every process of the service has in its environment, and in its command line.
    assert found(os.environ["PATH"], places) == {"environments"}
    assert found(str(guarded.files.tokens), places) >= {"command lines", "--print-config"}


def bad_requests() -> Iterator[tuple[str, bytes]]:
    """A method, and what it is sent."""
    good = png(picture(1))
    options: list[dict[str, Any]] = [
        {"num_beams": 0, "max_length": 10**6, "length_penalty": float("nan")},
        {"num_beams": 4, "num_beam_groups": 3, "do_sample": True, "temperature": -1.0},
        {"prefix": "\x00" * 9000},
        {"seed": 2**63 - 1, "top_p": float("inf")},
    ]
    requests = [request_of(file) for file in damaged_files(48, seed=5)]
    requests += [request_of(content) for content in (b"", b"no image", b"<svg/>", good[:60])]
    requests += [request_of(good, **each) for each in options]
    requests.append(caption_pb2.CaptionRequest())
    requests.append(caption_pb2.CaptionRequest(image=request_of(good).image, model_version=99))
    for request in requests:
        yield "Caption", request.SerializeToString()
        stream = caption_pb2.StreamCaptionRequest(request=request)
        yield "StreamCaption", stream.SerializeToString()
        item = caption_pb2.CaptionManyRequest(id="1", request=request, timeout=Duration(seconds=9))
        yield "CaptionMany", item.SerializeToString()
    for method in ("Caption", "StreamCaption", "CaptionMany", "GetModels", "Nothing"):
        yield method, b"\xff\xff"
    yield "Caption", bytes(65 << 20)
    yield "CaptionMany", bytes(65 << 20)


@pytest.mark.parametrize("guarded", ["text"], indirect=True)
def test_no_error_tells_of_the_insides(guarded: Guarded) -> None:
    guarded.told.clear()
    codes = {guarded.call(method, request) for method, request in bad_requests()}
    good = request_of(png(picture(1))).SerializeToString()
    codes.add(guarded.call("Caption", good, timeout=0.005))
    for metadata in ((), (("captionserve-request-bytes", "x"),), (("authorization", "Bearer x"),)):
        codes.add(guarded.call("Caption", good, metadata=metadata))
    crash(guarded, good)
    # Of each kind there was one.
    assert {code.name for code in codes} >= {
        "DEADLINE_EXCEEDED",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
        "UNAUTHENTICATED",
        "UNIMPLEMENTED",
    }
    assert not {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & codes
    assert [text for text in guarded.told if INSIDES.search(PUBLIC.sub(b"", text))] == []
    assert INSIDES.search(b"cannot read /srv/models/decoder/1/model.py")
    assert INSIDES.search(b"ValueError: not a number")
