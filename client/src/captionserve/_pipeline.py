"""The image-to-text pipeline of transformers 4.57, call for call, before whatever captions.

What it takes, gives back and raises is said here for a service and for the edge mode alike; only
the client's part, `pipeline`, needs a service. Results are asked for as they are taken: of a list
all at once, of a generator or a dataset as somebody iterates.
"""

from __future__ import annotations

import base64
import dataclasses
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypedDict, cast

import grpc

from captionserve._client import CaptionClient
from captionserve._fetch import fetch
from captionserve._images import ImageInput, images_of, is_floats
from captionserve._many import DEFAULT_WINDOW
from captionserve._options import GenerationOptions
from captionserve._transport import DEFAULT_TIMEOUT_SECONDS, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

TASK = "image-to-text"
# A server never needs them to give the same tokens.
_WITHOUT_EFFECT = frozenset({"use_cache"})
# generate() lets the first of them go before the second.
_REPLACED = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}
# Without do_sample=True generate() ignores them, and warns.
_OF_SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p"})
_UNREADABLE = frozenset({"IMAGE_CORRUPT", "UNSUPPORTED_IMAGE_FORMAT", "IMAGE_MISSING"})
_WRONG_VALUES = frozenset({"INVALID_OPTIONS", "INVALID_PIXEL_VALUES", "INVALID_REQUEST"})
_NO_SOURCE = (
    "an image given as text must be the path of a file, an address beginning with http:// or "
    "https://, a data URI or base64 of an image file, not {!r}"
)
_SHOWN_CHARACTERS = 60

Results = list[dict[str, str]]
"""The captions of one image, best first, each as {"generated_text": caption}."""


class Captioned(Protocol):
    """The captions of one image, such as a CaptionResult."""

    @property
    def captions(self) -> Sequence[Any]:
        """Each with its `text`."""


class Captioner(Protocol):
    """What a pipeline asks for captions."""

    def one(self, image: ImageInput, options: GenerationOptions) -> Captioned:
        """The captions of one image; raises what there is against it."""

    def each(
        self, images: Iterator[ImageInput], options: GenerationOptions, ahead: int
    ) -> Generator[Captioned | Exception, None, None]:
        """The captions of each image in turn, or what there is against it.

        Args:
            images: pulled by another thread, ahead of what is taken.
            options: for all of them.
            ahead: how many should be under way at least, where there are as many.
        """

    def close(self) -> None:
        """Let go of what captions."""


class CallKeywords(TypedDict, total=False):
    """What may be given when a pipeline is made, and with each call; None is as not given.

    Attributes:
        max_new_tokens: most tokens of a caption.
        generate_kwargs: decoding options by name, as of `GenerationOptions`.
        prompt: refused with each image, as transformers refuses it with these models.
        timeout: seconds that fetching an image may take; else 30.
        batch_size: images that are under way together, at least; changes no caption.
        num_workers: threads that read the images of a list or a dataset; else one.
        allow_urls: whether images are fetched from http and https addresses; else they are not.
    """

    max_new_tokens: int | None
    generate_kwargs: Mapping[str, object] | None
    prompt: str | None
    timeout: float | None
    batch_size: int | None
    num_workers: int | None
    allow_urls: bool | None


def pipeline(
    task: str | None = None,
    model: str | None = None,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    token: Token | None = None,
    call_timeout: float = DEFAULT_TIMEOUT_SECONDS,
    **keywords: Unpack[CallKeywords],
) -> ImageToTextPipeline:
    """The `pipeline("image-to-text")` of transformers, answered by a service.

    Args:
        task: "image-to-text", or None.
        model: HOST:PORT of the service; it connects with the first call.
        credentials: for TLS, as of `CaptionClient`.
        token: says who calls, likewise.
        call_timeout: seconds that the service may take for an image.
        **keywords: for calls that do not give them: max_new_tokens, generate_kwargs, prompt,
            timeout, batch_size, num_workers, allow_urls. See `ImageToTextPipeline`.

    Raises:
        KeyError: if the task is another.
        RuntimeError: if there is no model.
        TypeError: if there is no such keyword.
        ValueError: if an argument cannot be what it is.
    """
    check_task(task, model, "HOST:PORT of a service")
    client = CaptionClient(
        cast(str, model), timeout=call_timeout, credentials=credentials, token=token
    )
    return ImageToTextPipeline(_Service(client), **keywords)


def check_task(task: str | None, model: object, wanted: str) -> None:
    """Refuse another task, or no model, as transformers' pipeline() does.

    Raises:
        KeyError: if the task is another.
        RuntimeError: if there is no model; says what is wanted.
    """
    if task not in (None, TASK):
        raise KeyError(f"the task must be {TASK}, is {_short(task)!r}")
    if model is None:
        raise RuntimeError(f"there is no default model: give {wanted}")


class ImageToTextPipeline:
    """Captions images when it is called, as transformers' own does.

    Close it, or use it as a context manager, to let go of what captions.

    Attributes:
        task: "image-to-text".
    """

    task = TASK

    def __init__(self, captioner: Captioner, **keywords: Unpack[CallKeywords]) -> None:
        """Keep what captions, and keywords for calls that do not give them."""
        self._captioner = captioner
        self._settings = _Settings().with_given(**keywords)

    def __call__(
        self, inputs: object, *, images: object = None, **keywords: Unpack[CallKeywords]
    ) -> Any:  # noqa: ANN401  # As many types as there are kinds of inputs.
        """Caption an image or several.

        Args:
            inputs: an image is the path of a file, an http or https address (with allow_urls), a
                data URI or base64 text, a PIL image, or pixel values of shape (3, height, width) as
                the checkpoint's image processor makes them. Several are a list or a generator of
                such, a dataset of PyTorch's or any other object that has items and a length, or
                pixel values of shape (images, 3, height, width), also as items.
            images: the same by its former name.
            **keywords: max_new_tokens, generate_kwargs, prompt, timeout, batch_size, num_workers,
                allow_urls, as `CallKeywords` says them; they come before those of the pipeline.

        Returns:
            of one image its captions, each as {"generated_text": caption}; of a list such a list
            for each image, of a generator a generator of them, of a dataset an iterable that begins
            anew with each iteration.

        Raises:
            ValueError: if there is no input, a text is no image, or an option cannot be obeyed.
            TypeError: if an image is of another type, or there is no such keyword.
            OSError: if a file or what an address answers cannot be read, or is no image; Pillow's
                UnidentifiedImageError, where Pillow is installed.
            CaptionError: if the service fails otherwise. The edge mode has CaptionServeError.
        """
        inputs = inputs if images is None else images
        if inputs is None:
            raise ValueError("the image-to-text pipeline cannot be called without inputs")
        call = self._settings.with_given(**keywords)
        if is_floats(inputs):
            several = images_of(cast(ImageInput, inputs))
            inputs = inputs if isinstance(several, tuple) else list(several)
        if isinstance(inputs, list):
            call.check_several()
            return list(self._results(_indexed(inputs, call), call))
        if isinstance(inputs, GeneratorType):
            call.check_several()
            return self._results(map(call.read, inputs), call)
        if _is_dataset(inputs):
            call.check_several()
            return _DatasetResults(
                cast(_Items, inputs), lambda read: self._results(read, call), call
            )
        return self._result(inputs, call)

    def close(self) -> None:
        """Let go of what captions; later calls fail."""
        self._captioner.close()

    def __enter__(self) -> ImageToTextPipeline:
        """Give the pipeline itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _result(self, image: object, call: _Settings) -> Results:
        ((content, source),) = call.read(image)
        options = call.options()
        try:
            return _texts(self._captioner.one(content, options))
        except Exception as error:
            _raise_as_theirs(error, source)

    def _results(
        self, read: Iterator[list[_Read]], call: _Settings
    ) -> Generator[Results, None, None]:
        """What comes of each image that is read, up to the first that fails."""
        sources: deque[str | None] = deque()

        def contents() -> Iterator[ImageInput]:
            try:
                for images in read:
                    for content, text in images:
                        sources.append(text)
                        yield content
            except Exception as error:  # Its turn is after the results of those before it.
                sources.append(None)
                yield cast(ImageInput, _Failing(error))

        source: str | None = None
        outcomes = self._captioner.each(contents(), call.options(), call.batch_size)
        with closing(outcomes):
            try:
                for outcome in outcomes:
                    source = sources.popleft()
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield _texts(outcome)
            except Exception as error:
                _raise_as_theirs(error, source)


_Read = tuple[ImageInput, str | None]
"""An image, and the text that it was decoded from where it was in a text."""


@dataclass(frozen=True)
class _Settings:
    """Keywords of a call, over those of the pipeline.

    Attributes:
        generated: options of generate() by name.
        prompt: refused.
        timeout: of fetching, in seconds.
        batch_size: images under way.
        num_workers: threads that read.
        allow_urls: whether anything is fetched.
    """

    generated: Mapping[str, object] = dataclasses.field(default_factory=dict)
    prompt: object = None
    timeout: float | None = None
    batch_size: int = 1
    num_workers: int = 0
    allow_urls: bool = False

    def with_given(
        self,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, object] | None = None,
        prompt: object = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        allow_urls: bool | None = None,
    ) -> _Settings:
        """These with what is given, where it is not None, in their places.

        Raises:
            ValueError: if max_new_tokens is given twice.
            TypeError: if generate_kwargs is no mapping.
        """
        alone = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        options = {} if generate_kwargs is None else dict(generate_kwargs)
        if alone and "max_new_tokens" in options:
            raise ValueError("max_new_tokens is given both by itself and in generate_kwargs")
        return _Settings(
            generated={**self.generated, **alone, **options},
            prompt=self.prompt if prompt is None else prompt,
            timeout=self.timeout if timeout is None else timeout,
            batch_size=self.batch_size if batch_size is None else batch_size,
            num_workers=self.num_workers if num_workers is None else num_workers,
            allow_urls=self.allow_urls if allow_urls is None else allow_urls,
        )

    def check_several(self) -> None:
        """Refuse numbers that mean nothing, as PyTorch's DataLoader does.

        Raises:
            ValueError: names the number.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, is {self.batch_size}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, is {self.num_workers}")

    def options(self) -> GenerationOptions:
        """The options, as generate() would read them.

        Raises:
            ValueError: if there is no option of such a name.
        """
        given = {
            name: value
            for name, value in self.generated.items()
            if value is not None and name not in _WITHOUT_EFFECT
        }
        known = {field.name for field in dataclasses.fields(GenerationOptions)}
        if unknown := given.keys() - known:
            names = ", ".join(sorted(_short(name) for name in unknown))
            raise ValueError(f"generate_kwargs has no options of the names: {names}")
        if given.get("do_sample") is not True and (idle := given.keys() & _OF_SAMPLING):
            names = ", ".join(sorted(idle))
            warnings.warn(f"without do_sample=True these change nothing: {names}", stacklevel=4)
            given = {name: value for name, value in given.items() if name not in idle}
        for first, second in _REPLACED.items():
            if first in given:
                given.pop(second, None)
        return GenerationOptions(**cast("dict[str, Any]", given))

    def read(self, image: object) -> list[_Read]:
        """An image, or those of a batch, so that whoever captions can take them.

        Raises:
            TypeError: if it is no image.
            ValueError: if a text is no image, or there is a prompt.
            OSError: if it cannot be read.
        """
        read = self._read(image)
        if self.prompt is not None:
            raise ValueError(
                "these models do not take a prompt; text with which a caption shall begin is "
                'generate_kwargs={"prefix": ...}'
            )
        return read

    def _read(self, image: object) -> list[_Read]:
        if isinstance(image, str):
            return [self._read_text(image)]
        if is_floats(image):
            return [(each, None) for each in images_of(cast(ImageInput, image))]
        pillow = sys.modules.get("PIL.Image")  # Who has such an image has imported it.
        if pillow is not None and isinstance(image, pillow.Image):
            return [(image, None)]
        raise TypeError(
            "an image must be a path or an address as str, base64 text, a PIL image or pixel "
            f"values, is {type(image).__name__}"
        )

    def _read_text(self, text: str) -> _Read:
        # Not of any case: transformers takes others for the name of a file, too.
        if text.startswith(("http://", "https://")):
            if not self.allow_urls:
                raise ValueError("nothing is fetched from addresses without allow_urls=True")
            try:
                content = fetch(text, self.timeout)
            except (TimeoutError, ConnectionError):
                raise
            except OSError as error:
                raise _unidentified(str(error)) from error
            return _not_empty(content), None
        if _is_file(text):
            return _not_empty(Path(text).read_bytes()), None
        return _decoded(text), text


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # Base64 is longer than any path may be.
        return False


def _not_empty(content: bytes) -> bytes:
    if not content:
        raise _unidentified("the image is empty")
    return content


def _decoded(text: str) -> bytes:
    """The file in a data URI or base64 text."""
    encoded = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        content = b""
    if not content:
        raise ValueError(_NO_SOURCE.format(_short(text)))
    return content


class _Failing:
    """A file that raises when it is read: an image whose error comes when it is its turn."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self) -> bytes:
        raise self._error


class _Items(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> object: ...


def _indexed(items: _Items, call: _Settings) -> Iterator[list[_Read]]:
    """What is read of each item of a list or a dataset, in their order."""

    def read(place: int) -> list[_Read]:
        return call.read(items[place])

    places = range(len(items))
    if call.num_workers < 2:
        return map(read, places)
    return _in_threads(read, places, call.num_workers)


def _in_threads(
    read: Callable[[int], list[_Read]], places: Iterable[int], threads: int
) -> Iterator[list[_Read]]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pipeline-images")
    pending: deque[Future[list[_Read]]] = deque()
    try:
        for place in places:
            pending.append(pool.submit(read, place))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _is_dataset(inputs: object) -> bool:
    """Whether this is a dataset of PyTorch's, or likewise an object with items and a length."""
    torch_data = sys.modules.get("torch.utils.data")  # Who has such a dataset has imported it.
    if torch_data is not None and isinstance(inputs, torch_data.Dataset):
        return True
    of_python = type(inputs).__module__ == "builtins"
    has_items = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
    return has_items and not (of_python or isinstance(inputs, Mapping) or hasattr(inputs, "dtype"))


class _DatasetResults:
    """The results of a dataset's images, anew with each iteration."""

    def __init__(
        self,
        dataset: _Items,
        results: Callable[[Iterator[list[_Read]]], Generator[Results, None, None]],
        call: _Settings,
    ) -> None:
        self._dataset = dataset
        self._results = results
        self._call = call

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Generator[Results, None, None]:
        if hasattr(self._dataset, "__len__"):
            return self._results(_indexed(self._dataset, self._call))
        # A stream, whose length nobody knows.
        return self._results(map(self._call.read, cast("Iterable[object]", self._dataset)))


class _Service:
    """A service, as a pipeline asks it."""

    def __init__(self, client: CaptionClient) -> None:
        self._client = client

    def one(self, image: ImageInput, options: GenerationOptions) -> Captioned:
        return self._client.caption(image, options)

    def each(
        self, images: Iterator[ImageInput], options: GenerationOptions, ahead: int
    ) -> Generator[Captioned | Exception, None, None]:
        window = max(ahead, DEFAULT_WINDOW)
        for outcome in self._client.caption_many(images, options, window=window):
            yield cast("Captioned | Exception", outcome.result or outcome.error)

    def close(self) -> None:
        self._client.close()


def _texts(captioned: Captioned) -> Results:
    return [{"generated_text": caption.text} for caption in captioned.captions]


def _raise_as_theirs(error: Exception, source: str | None) -> NoReturn:
    """Raise what transformers raises where it has a name for it, else the error itself.

    Args:
        error: of whatever captions.
        source: the text that the image was decoded from, if it was.
    """
    reason, message = getattr(error, "reason", None), getattr(error, "message", str(error))
    if reason in _WRONG_VALUES:
        raise ValueError(message) from error
    if reason == "UNSUPPORTED_IMAGE_FORMAT" and source is not None:
        raise ValueError(_NO_SOURCE.format(_short(source))) from error
    if reason in _UNREADABLE:
        raise _unidentified(message) from error
    raise error


def _unidentified(message: str) -> OSError:
    """Pillow's error of a file that is no image; OSError, which it is one of, without Pillow."""
    try:
        from PIL import UnidentifiedImageError
    except ImportError:
        return OSError(message)
    return UnidentifiedImageError(message)


def _short(text: object) -> str:
    shown = str(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + "..."
