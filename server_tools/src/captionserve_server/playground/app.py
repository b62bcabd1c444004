"""The page's server: a few files, and a thin way from the page to a captioner.

    GET  /                 the page; its modules, style and samples beside it
    GET  /api/options      every decoding option, as core/options.py says it
    GET  /api/model        what answers
    POST /api/caption      an image and what is asked -> lines of JSON, as they become known
    POST /api/alt-text     a caption and a budget -> a draft of an alt text

No cookies, no state: whatever the page knows of its visit it keeps to itself. What says who calls
the service, such as a token, stays here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from captionserve import CaptionError, Framing, GenerationOptions
from captionserve._alt_text import alt_text_of
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from captionserve_server.core.options import OPTIONS, DecodingOptions
from captionserve_server.playground.captioners import Captioner
from captionserve_server.playground.security import OwnPageOnly

# Options and framing are a few hundred bytes; lists of words, all full, 165,000.
_MAX_ASKED_BYTES = 256 * 1024
# The system's own tables may call modules something else, and then a browser does not run them.
_KINDS = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_OPENED = Callable[[], AbstractAsyncContextManager[Captioner]]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What visitors may ask of the page's server.

    Attributes:
        image_bytes: largest image.
        at_once: captions in work; one more is refused.
        upload_seconds: for an image to arrive.
        caption_seconds: for its caption.
    """

    image_bytes: int = 32 * 2**20
    at_once: int = 8
    upload_seconds: float = 60.0
    caption_seconds: float = 60.0


class Refused(Exception):  # noqa: N818  # It is an answer.
    """A request that is answered with an error of ours."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        """An answer of an HTTP status, with a reason for programs and a sentence for people."""
        super().__init__(message)
        self.status = status
        self.error = {"code": "INVALID_ARGUMENT", "reason": reason, "message": message}
        if status == 429:
            self.error["code"] = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is asked of an image."""

    options: GenerationOptions
    framing: Framing


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the page knows of a caption, as `alt_text_of` wants it."""

    text: str
    confidence: float
    degenerate: bool


class Playground:
    """The answers of the page's server."""

    def __init__(self, bounds: Bounds) -> None:
        """Begin without a captioner.

        Args:
            bounds: what visitors may ask.
        """
        self._bounds = bounds
        self._working = 0
        self.captioner: Captioner | None = None

    async def options(self, request: Request) -> Response:
        """Every decoding option."""
        return JSONResponse({"options": described_options()})

    async def model(self, request: Request) -> Response:
        """What answers; or, with status 200 too, why nothing does: the page says it in words."""
        try:
            facts = await self._captioner().facts()
        except CaptionError as error:
            return _json({"error": error_as_json(error)})
        bounds = {"image_bytes": self._bounds.image_bytes, "at_once": self._bounds.at_once}
        return _json({**facts, "bounds": bounds})

    async def caption(self, request: Request) -> Response:
        """Caption an image: lines of {"text", "beam_steps"}, at last of {"result"} or {"error"}."""
        if self._working >= self._bounds.at_once:
            raise Refused(429, "OVERLOADED", "too many captions are in work; try again soon")
        self._working += 1
        try:
            body = await self._body(request, self._bounds.image_bytes + _MAX_ASKED_BYTES)
            asked, image = _read_asked(body)
            if len(image) > self._bounds.image_bytes:
                raise self._too_large()
        except BaseException:
            self._end()
            raise
        return _Lines(self._events(image, asked), self._end)

    async def alt_text(self, request: Request) -> Response:
        """A draft of an alt text for a caption that the page has already."""
        asked = _parsed(await self._body(request, _MAX_ASKED_BYTES))
        try:
            draft = alt_text_of(
                _Told(**asked["caption"]),
                asked["max_chars"],
                nearby_text=asked["nearby_text"],
                file_name=asked["file_name"],
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Refused(
                400, "INVALID_REQUEST", "an alt text needs a caption, and room"
            ) from error
        return _json(dataclasses.asdict(draft))

    def _end(self) -> None:
        self._working -= 1

    async def _events(self, image: bytes, asked: _Asked) -> AsyncGenerator[Mapping[str, Any], None]:
        begun = time.monotonic()
        end = asyncio.get_running_loop().time() + self._bounds.caption_seconds
        updates: Any = self._captioner().captions(image, asked.options, asked.framing)
        async with aclosing(updates):
            while True:
                left = end - asyncio.get_running_loop().time()
                try:
                    update = await asyncio.wait_for(anext(updates), left)
                except StopAsyncIteration:
                    return
                except CaptionError as error:
                    yield {"error": error_as_json(error)}
                    return
                except asyncio.TimeoutError:
                    message = f"no caption within {self._bounds.caption_seconds:g} seconds"
                    yield {
                        "error": {
                            "code": "DEADLINE_EXCEEDED",
                            "reason": "DEADLINE_EXCEEDED",
                            "message": message,
                        }
                    }
                    return
                if update.result is None:
                    steps = [list(map(vars, step)) for step in update.beam_steps]
                    yield {"text": update.text, "beam_steps": steps}
                else:
                    result = dataclasses.asdict(update.result)
                    yield {"result": result, "seconds": time.monotonic() - begun}

    async def _body(self, request: Request, most: int) -> bytes:
        """A request's body.

        Raises:
            Refused: if it is too large or takes too long, or is of a kind that any page may send.
        """
        if request.headers.get("content-type") != "application/octet-stream":
            # Other kinds a browser sends for any page without asking first.
            raise Refused(415, "INVALID_REQUEST", "the body must be application/octet-stream")
        announced = request.headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > most:
            raise self._too_large()
        body = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > most:
                    raise self._too_large()

        try:
            await asyncio.wait_for(read(), self._bounds.upload_seconds)
        except asyncio.TimeoutError as error:
            raise Refused(408, "DEADLINE_EXCEEDED", "the image took too long to arrive") from error
        except ClientDisconnect as error:
            raise Refused(400, "CANCELLED", "the page has gone") from error
        return bytes(body)

    def _too_large(self) -> Refused:
        most = self._bounds.image_bytes / 2**20
        return Refused(413, "IMAGE_TOO_LARGE", f"an image may have at most {most:g} MiB")

    def _captioner(self) -> Captioner:
        if self.captioner is None:
            raise RuntimeError("the app has not been started")
        return self.captioner


def playground_app(
    opened: _OPENED,
    names: Collection[str],
    bounds: Bounds = Bounds(),  # Frozen.
) -> Starlette:
    """The page's server as an ASGI app.

    Args:
        opened: gives the captioner, from the app's start to its end.
        names: of hosts that the app may be asked by, beside every IP address.
        bounds: what visitors may ask.
    """
    playground = Playground(bounds)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with opened() as captioner:
            playground.captioner = captioner
            yield

    return Starlette(
        routes=[
            Route("/api/options", playground.options),
            Route("/api/model", playground.model),
            Route("/api/caption", playground.caption, methods=["POST"]),
            Route("/api/alt-text", playground.alt_text, methods=["POST"]),
            *(Route(path, _file(path)) for path in files()),
        ],
        middleware=[Middleware(OwnPageOnly, names=names)],
        exception_handlers={Refused: _refused},
        lifespan=lifespan,
    )


@cache
def files() -> Mapping[str, tuple[bytes, str]]:
    """What lies beside the page: content and media type, by path."""
    found: dict[str, tuple[bytes, str]] = {}
    for folder, prefix in (("page", "/"), ("samples", "/samples/")):
        for file in sorted((Path(__file__).parent / folder).iterdir()):
            found[prefix + ("" if file.name == "index.html" else file.name)] = _read(file)
    names = sorted(path for path in found if path.startswith("/samples/"))
    found["/samples/index.json"] = (json.dumps(names).encode(), "application/json")
    return found


def _read(file: Path) -> tuple[bytes, str]:
    return file.read_bytes(), _KINDS[file.suffix]


def _file(path: str) -> Callable[[Request], Any]:
    content, kind = files()[path]

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def described_options() -> list[dict[str, Any]]:
    """Every decoding option as JSON values: all that core/options.py says of it."""
    defaults = DecodingOptions().as_given()
    return [
        {
            "name": name,
            "kind": option.kind.__name__,
            "is_list": option.max_items is not None,
            "help": option.help,
            "range": option.range(),
            "least": option.least,
            "most": option.most,
            "above_least": option.above_least,
            "words": option.words,
            "max_items": option.max_items,
            "max_characters": option.max_characters,
            "flag": option.flag or "--" + name.replace("_", "-"),
            "default": defaults.get(name),
        }
        for name, option in OPTIONS.items()
    ]


def error_as_json(error: CaptionError) -> dict[str, Any]:
    """A failed call as JSON values."""
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "fields": dict(error.field_violations),
    }


class _Lines(StreamingResponse):
    """A response of lines of JSON; whoever has to know is told when it has ended."""

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any], None], on_end: Callable[[], None]
    ) -> None:
        self._events = events
        self._on_end = on_end
        super().__init__(self._lines(), media_type="application/x-ndjson; charset=utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Also of a page that goes away before the first line: nothing else would end it then.
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()

    async def _lines(self) -> AsyncIterator[str]:
        async for event in self._events:
            yield _line(event)


async def _refused(request: Request, refused: Exception) -> Response:
    if not isinstance(refused, Refused):
        raise refused
    return JSONResponse({"error": refused.error}, status_code=refused.status)


def _read_asked(body: bytes) -> tuple[_Asked, bytes]:
    """What is asked, a line of JSON, and the image, all that stands behind it."""
    line, newline, image = body.partition(b"\n")
    asked = _parsed(line) if newline and len(line) <= _MAX_ASKED_BYTES else {}
    options = asked.pop("options", None)
    if not isinstance(options, dict) or asked.keys() - Framing.__annotations__.keys():
        raise Refused(400, "INVALID_REQUEST", "the body must be a line of JSON, then the image")
    unknown = sorted(options.keys() - OPTIONS.keys())
    if unknown:
        raise Refused(400, "INVALID_OPTIONS", f"{unknown[0][:60]} is not an option")
    framing: Any = asked
    return _Asked(GenerationOptions(**options), framing), image


def _parsed(text: bytes) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _json(values: Mapping[str, Any]) -> Response:
    return Response(_line(values), media_type="application/json")


def _line(values: Mapping[str, Any]) -> str:
    """One line of JSON; what is no number in JSON is null."""
    return json.dumps(_finite(values), ensure_ascii=False, separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
