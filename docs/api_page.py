"""The page of the gRPC API, from the comments of the .proto file."""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.rpc import status_pb2
from grpc_tools import protoc

_PROTO = Path(__file__).resolve().parents[1] / "proto"
_FILE = "captionserve/v1/caption.proto"
_PACKAGE = ".captionserve.v1."

_HEAD = """# The gRPC API

`proto/captionserve/v1/caption.proto` is the only hand-written API; a running service has
reflection. Fields are only ever added. `make generate` writes this page.
"""

# Where descriptor.proto has the parts of a file, and those of a message, an enum and a service.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS = _VALUES = _METHODS = 2

Said = Callable[..., str]
"""Gives the comment at what has this path in the file."""


def api_page() -> str:
    """The page whole."""
    file = _described()
    comments = {
        tuple(each.path): " ".join(each.leading_comments.split())
        for each in file.source_code_info.location
    }

    def said(*path: int) -> str:
        return comments[path]

    return "".join(
        (
            _HEAD,
            *(_service(each, (_SERVICES, n), said) for n, each in enumerate(file.service)),
            "\n## Messages\n",
            *(_message(each, (_MESSAGES, n), said) for n, each in enumerate(file.message_type)),
            "\n## Enumerations\n",
            *(_enum(each, (_ENUMS, n), said) for n, each in enumerate(file.enum_type)),
        )
    )


def _described() -> FileDescriptorProto:
    """The API, with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "api.pb")
        paths = (
            _PROTO,
            importlib.resources.files("grpc_tools") / "_proto",
            Path(status_pb2.__file__).parents[2],
        )
        arguments = [f"-I{path}" for path in paths]
        arguments += ["--include_source_info", f"--descriptor_set_out={output}"]
        if protoc.main(["protoc", *arguments, _FILE]) != 0:
            raise SystemExit("protoc failed")
        (file,) = FileDescriptorSet.FromString(output.read_bytes()).file
    return file


def _service(service: ServiceDescriptorProto, path: tuple[int, ...], said: Said) -> str:
    rows = (
        (
            f"`{method.name}`",
            _streamed(_linked(method.input_type), method.client_streaming),
            _streamed(_linked(method.output_type), method.server_streaming),
            said(*path, _METHODS, number),
        )
        for number, method in enumerate(service.method)
    )
    table = _table(("call", "takes", "gives", "what it does"), rows)
    return f"\n## {service.name}\n\n{said(*path)}\n\n{table}"


def _message(message: DescriptorProto, path: tuple[int, ...], said: Said) -> str:
    head = f"\n### {message.name}\n\n{said(*path)}\n"
    if not message.field:
        return head
    rows = (
        (
            f"`{field.name}`",
            str(field.number),
            _kind(field, message),
            said(*path, _FIELDS, number),
        )
        for number, field in enumerate(message.field)
    )
    return f"{head}\n{_table(('field', 'number', 'type', 'what it is'), rows)}"


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], said: Said) -> str:
    rows = (
        (f"`{value.name}`", str(value.number), said(*path, _VALUES, number))
        for number, value in enumerate(enum.value)
    )
    table = _table(("value", "number", "what it means"), rows)
    return f"\n### {enum.name}\n\n{said(*path)}\n\n{table}"


def _kind(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    if field.type_name:
        name = _linked(field.type_name)
    else:
        name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _linked(name: str) -> str:
    own = name.removeprefix(_PACKAGE)
    return name.removeprefix(".") if own == name else f"[{own}](#{own.lower()})"


def _streamed(name: str, streaming: bool) -> str:
    return f"stream of {name}" if streaming else name


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "".join(
        f"| {' | '.join(each.replace('|', '&#124;') for each in cells)} |\n" for cells in lines
    )
