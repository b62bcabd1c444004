"""The edge mode: what it needs, what it refuses, and how several captions go together."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve import GenerationOptions
from captionserve_server.core.engine.engine_thread import Caller, EngineThread
from captionserve_server.core.engine.scheduler import Scheduler, SchedulerLimits
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    ImageCorruptError,
    ImageTooManyPixelsError,
    InvalidOptionsError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.local import (
    ImageInput,
    LocalCaptioner,
    LocalResult,
    LocalStream,
    LocalUpdate,
    ModelFolderError,
)
from captionserve_server.local import model_folder as model_folder_module
from captionserve_server.runtime.graph_tensors import PIXELS, TOKENS
from captionserve_server.runtime.onnx_graph import OnnxGraph
from PIL import Image
from tokenizers import Tokenizer

from tests.reference import picture

NAME = "projected"
FILES = [
    "decoder/1/bundle.json",
    "decoder/1/tokenizer.json",
    "decoder/1/preprocessor.json",
    "vision_encoder/1/model.onnx",
    "decoder/1/prefill.onnx",
    "decoder/1/step.onnx",
    "decoder/1/top.onnx",
]
NOT_NEEDED = ("torch", "transformers", "onnx", "grpc", "google", "tritonclient", "pytriton")
PICTURES = [picture(seed) for seed in range(6)]
WAIT_SECONDS = 60.0
# More than any caption here takes.
WAIT_STEPS = 100


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


@pytest.fixture
def captioner(model_repository: Callable[[str], Path]) -> Iterator[LocalCaptioner]:
    with LocalCaptioner(model_repository(NAME), threads=1, limits=SchedulerLimits(slots=2)) as made:
        yield made


@pytest.fixture
def repository(model_repository: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the model repository, to be spoilt."""
    return Path(shutil.copytree(model_repository(NAME), tmp_path / "repository"))


def texts(results: list[LocalResult]) -> list[str]:
    return [result.text for result in results]


def test_it_needs_neither_triton_nor_torch_nor_grpc(
    model_repository: Callable[[str], Path], captioner: LocalCaptioner, tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    PICTURES[0].save(image)
    code = f"""
import sys
for name in (*{NOT_NEEDED!r}, "captionserve"):
    sys.modules[name] = None
from captionserve_server.local import LocalCaptioner
with LocalCaptioner({str(model_repository(NAME))!r}, threads=1) as captioner:
    print(captioner.caption({str(image)!r}, num_beams=2).captions[0].token_ids)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stderr
    expected = captioner.caption(PICTURES[0], num_beams=2).captions[0].token_ids
    assert process.stdout.strip() == str(expected)


def test_a_pipeline_without_the_client_says_what_is_missing(
    model_repository: Callable[[str], Path],
) -> None:
    code = f"""
import sys
sys.modules["captionserve"] = None
from captionserve_server.local import pipeline
try:
    pipeline("image-to-text", model={str(model_repository(NAME))!r})
except ImportError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "pip install captionserve" in process.stdout


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, repository: Path) -> None:
    (repository / name).unlink()
    with pytest.raises(ModelFolderError, match=f"has no {name}"):
        LocalCaptioner(repository)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, repository: Path) -> None:
    (repository / name).write_text("{ no such thing")
    with pytest.raises(ModelFolderError, match=f"{name} of .* cannot be loaded"):
        LocalCaptioner(repository)


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelFolderError, match="no model repository"):
            LocalCaptioner(folder)


def test_the_newest_version_is_taken_unless_one_is_chosen(repository: Path) -> None:
    for version in ("2", "10"):
        for model in {name.split("/")[0] for name in FILES}:
            shutil.copytree(repository / model / "1", repository / model / version)
    with LocalCaptioner(repository, threads=1) as newest:
        assert newest.model_version == 10
        assert newest.caption(PICTURES[0]).model_version == 10
    with LocalCaptioner(repository, version=2, threads=1) as chosen:
        assert chosen.model_version == 2
    with pytest.raises(ModelFolderError, match=r"has no decoder/3/bundle\.json"):
        LocalCaptioner(repository, version=3)


def test_threads_are_onnx_runtimes_and_spin(
    model_repository: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[Mapping[str, Any]] = []

    def recorded(path: Path, **given: Any) -> OnnxGraph:
        settings.append(given)
        return OnnxGraph(path, **given)

    monkeypatch.setattr(model_folder_module, "OnnxGraph", recorded)
    for threads in (0, 2):
        LocalCaptioner(model_repository(NAME), threads=threads).close()
        assert len(settings) == 4
        assert all(given["threads"] == threads for given in settings)
        # Nobody else wants the cores.
        assert all(given.get("spinning", True) for given in settings)
        settings.clear()


def test_captions_are_the_same_with_any_number_of_threads(
    model_repository: Callable[[str], Path], captioner: LocalCaptioner
) -> None:
    with LocalCaptioner(model_repository(NAME), threads=2) as several:
        assert texts(several.caption_all(PICTURES)) == texts(captioner.caption_all(PICTURES))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"threads": -1}, "threads must be 0 or more"),
        ({"limits": SchedulerLimits(slots=0)}, "slots"),
        ({"limits": SchedulerLimits(max_rows=0)}, "max_rows"),
        ({"limits": SchedulerLimits(max_entries=-1)}, "max_entries"),
        ({"limits": SchedulerLimits(max_admissions=0)}, "max_admissions"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    wrong: dict[str, Any], named: str, model_repository: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=named):
        LocalCaptioner(model_repository(NAME), **wrong)


def test_a_result_tells_all_that_is_known(captioner: LocalCaptioner) -> None:
    result = captioner.caption(
        PICTURES[0],
        num_beams=3,
        num_return_sequences=2,
        prefix="a",
        output_attentions=True,
        max_length=12,
    )
    assert len(result.captions) == 2
    assert result.text == result.captions[0].text
    for caption in result.captions:
        tokens = len(caption.token_ids)
        assert caption.text.startswith("a")
        assert caption.score == pytest.approx(sum(caption.token_logprobs) / tokens, abs=1e-5)
        assert len(caption.token_texts) == len(caption.token_logprobs) == tokens
        assert ("a" + "".join(caption.token_texts)).strip() == caption.text
        assert caption.finish_reason in {"eos", "length"}
        assert 0 < caption.confidence < 1
        assert caption.attention is not None
        assert caption.attention.shape == (tokens, 4, 4)
        assert (caption.attention.sum(axis=(1, 2)) <= 1.001).all()
    assert captioner.caption(PICTURES[0]).captions[0].attention is None


def test_bad_images_do_not_end_the_others(captioner: LocalCaptioner, tmp_path: Path) -> None:
    good = texts(captioner.caption_all(PICTURES))
    images: list[ImageInput] = [PICTURES[0], b"", *PICTURES[1:], tmp_path / "missing.png"]
    first, corrupt, *others, missing = captioner.caption_each(images)
    assert isinstance(corrupt, ImageCorruptError)
    assert isinstance(missing, FileNotFoundError)
    results = [each for each in (first, *others) if isinstance(each, LocalResult)]
    assert texts(results) == good
    with pytest.raises(ImageCorruptError):
        captioner.caption_all(images)
    with pytest.raises(ImageCorruptError):
        captioner.caption(b"")


def test_wrong_options_are_refused_before_any_image_is_read(captioner: LocalCaptioner) -> None:
    def images() -> Iterator[Image.Image]:
        raise AssertionError("an image was read")
        yield

    with pytest.raises(InvalidOptionsError) as refused:
        captioner.caption_each(images(), num_beams=99, min_length=-1)
    assert set(refused.value.field_violations) == {"num_beams", "min_length"}


def test_wrong_types_are_refused_by_name_as_the_service_does(captioner: LocalCaptioner) -> None:
    wrong: Any = {"num_beams": "4", "bad_words": "dog", "num_beamz": 4}
    with pytest.raises(InvalidOptionsError) as refused:
        captioner.caption(PICTURES[0], **wrong)
    assert set(refused.value.field_violations) == set(wrong)


def test_options_by_name_come_before_those_of_the_dataclass(captioner: LocalCaptioner) -> None:
    options = GenerationOptions(num_beams=3, num_return_sequences=3)
    result = captioner.caption(PICTURES[0], options, num_return_sequences=2, num_beams=None)
    assert len(result.captions) == 2


def test_images_are_read_when_their_turn_comes(captioner: LocalCaptioner) -> None:
    read: list[int] = []

    def images() -> Iterator[io.BytesIO]:
        for number in range(40):
            read.append(number)
            content = io.BytesIO()
            PICTURES[number % len(PICTURES)].save(content, "PNG")
            content.seek(0)
            yield content

    captions = captioner.caption_each(images())
    assert not read
    for done, _ in enumerate(captions, start=1):
        # Two for each of the two slots.
        assert len(read) < done + 4
    assert len(read) == 40


def test_who_looks_at_no_more_results_is_not_captioned_for(
    captioner: LocalCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[Caller] = []
    submit = EngineThread.submit

    def recorded(self: EngineThread, *given: Any) -> Any:
        callers.append(given[2])
        return submit(self, *given)

    monkeypatch.setattr(EngineThread, "submit", recorded)
    captions = captioner.caption_each(PICTURES)
    assert isinstance(captions, Iterator)
    next(captions)
    # Four ahead of the result that has been looked at.
    wait_until(lambda: len(callers) == 4)
    assert not all(caller.has_gone for caller in callers)
    captions.close()  # type: ignore[attr-defined]  # A generator.
    wait_until(lambda: all(caller.has_gone for caller in callers))
    assert len(callers) <= 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2, "prefix": "a \u00e9 "},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "force_words": ["dog"]},
        {"num_beams": 3, "rerank": "grounding"},
        {"do_sample": True, "seed": 4, "num_return_sequences": 3, "output_grounding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("output_beams", [True, False])
def test_a_stream_is_the_result_piece_by_piece(
    captioner: LocalCaptioner, options: Any, output_beams: bool
) -> None:
    asked = {"max_length": 16, "output_beams": output_beams, **options}
    *updates, last = captioner.caption_stream(PICTURES[0], **asked)
    result = captioner.caption(PICTURES[0], **asked)
    assert last == LocalUpdate("", (), result)
    assert all(update.result is None for update in updates)
    best = result.captions[0]
    assert "".join(update.text for update in updates) == best.text
    assert tuple(chain.from_iterable(update.token_ids for update in updates)) == best.token_ids
    steps = tuple(chain.from_iterable(update.beam_steps for update in updates))
    assert steps == (result.beams.steps if result.beams is not None else ())
    assert bool(steps) is output_beams
    if output_beams:
        # Not all at the end.
        assert len(updates) >= len(steps)
        assert all(len(update.beam_steps) <= 1 for update in updates)


def test_words_are_given_out_before_the_caption_is_complete(
    captioner: LocalCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_step = threading.Semaphore(0)
    step = Scheduler.step

    def held(self: Scheduler) -> Any:
        assert may_step.acquire(timeout=WAIT_SECONDS)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", held)
    updates = captioner.caption_stream(PICTURES[0], max_length=10, min_length=10)
    for _ in range(8):
        may_step.release()
        update = next(updates)
        assert (len(update.token_ids), update.result) == (1, None)
    may_step.release(WAIT_STEPS)
    *_, last = updates
    assert last.result is not None
    assert next(updates, None) is None


LEAVING: list[Callable[[LocalStream], None]] = [LocalStream.close, lambda updates: None]


@pytest.mark.parametrize("leave", LEAVING, ids=["closed", "dropped"])
def test_who_leaves_a_stream_is_not_captioned_for(
    captioner: LocalCaptioner,
    monkeypatch: pytest.MonkeyPatch,
    leave: Callable[[LocalStream], None],
) -> None:
    abandoned: list[Hashable] = []
    abandon = Scheduler.abandon

    def recorded(self: Scheduler, key: Hashable) -> None:
        abandoned.append(key)
        abandon(self, key)

    monkeypatch.setattr(Scheduler, "abandon", recorded)
    updates = captioner.caption_stream(PICTURES[0], max_length=40, min_length=40)
    next(updates)
    leave(updates)
    del updates
    wait_until(lambda: len(abandoned) == 1)
    # Its slot is free again.
    assert len(captioner.caption_all(PICTURES)) == len(PICTURES)


def test_a_closed_stream_gives_no_more(captioner: LocalCaptioner) -> None:
    updates = captioner.caption_stream(PICTURES[0], max_length=40, min_length=40)
    next(updates)
    # More is waiting there to be taken.
    wait_until(lambda: updates._begun.news.qsize() > 0)
    updates.close()
    assert list(updates) == []


def test_closing_a_stream_wakes_who_waits_for_it(
    captioner: LocalCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_step = threading.Event()
    step = Scheduler.step

    def held(self: Scheduler) -> Any:
        assert may_step.wait(WAIT_SECONDS)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", held)
    updates = captioner.caption_stream(PICTURES[0], num_beams=2, max_length=40, min_length=40)
    waiting: Future[LocalUpdate] = Future()

    def wait() -> None:
        try:
            for update in updates:
                waiting.set_result(update)
        except Exception as error:
            waiting.set_exception(error)

    thread = threading.Thread(target=wait)
    thread.start()
    updates.close()
    may_step.set()
    assert isinstance(waiting.exception(WAIT_SECONDS), CancelledError)
    thread.join()


def test_a_stream_raises_what_a_caption_raises(captioner: LocalCaptioner, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionsError):
        captioner.caption_stream(PICTURES[0], num_beams=99)
    with pytest.raises(TypeError):
        captioner.caption_stream(3)  # type: ignore[arg-type]
    for image, expected in ((b"no image", CaptionServeError), (tmp_path / "no", OSError)):
        updates = captioner.caption_stream(image)
        with pytest.raises(expected):
            next(updates)
        assert next(updates, None) is None
    with pytest.raises(InvalidOptionsError, match="force_words"):
        list(
            captioner.caption_stream(
                PICTURES[0], num_beams=2, max_length=4, force_words=["a dog barks"]
            )
        )


def test_a_caption_is_given_out_before_the_next_image_comes(captioner: LocalCaptioner) -> None:
    given_out = threading.Semaphore(0)

    def images() -> Iterator[Image.Image]:
        for image in PICTURES:
            yield image
            assert given_out.acquire(timeout=WAIT_SECONDS)

    found: list[str] = []
    for outcome in captioner.caption_each(images()):
        assert isinstance(outcome, LocalResult)
        found.append(outcome.text)
        given_out.release()
    assert found == texts(captioner.caption_all(PICTURES))


def test_what_the_images_raise_comes_after_the_captions_before_it(
    captioner: LocalCaptioner,
) -> None:
    def images() -> Iterator[Any]:
        yield PICTURES[0]
        raise KeyError("the source has failed")

    captions = captioner.caption_each(images())
    assert isinstance(next(captions), LocalResult)
    with pytest.raises(KeyError, match="the source has failed"):
        next(captions)
    wrong: Any = [PICTURES[0], 7]
    captions = captioner.caption_each(wrong)
    assert isinstance(next(captions), LocalResult)
    with pytest.raises(TypeError, match="an image must be a path"):
        next(captions)


def test_threads_that_look_ahead_end(captioner: LocalCaptioner) -> None:
    def looking_ahead() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "images-ahead"]

    never = threading.Event()

    def images() -> Iterator[Image.Image]:
        yield PICTURES[0]
        never.wait(WAIT_SECONDS)
        yield PICTURES[1]

    captioner.caption_all(PICTURES)
    captions = captioner.caption_each(images())
    next(captions)
    captions.close()  # type: ignore[attr-defined]  # A generator.
    never.set()
    wait_until(lambda: not looking_ahead())


def test_no_warning_filter_is_changed_while_images_are_captioned(
    captioner: LocalCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*_: Any, **__: Any) -> None:
        raise AssertionError("the filters are the whole process's")

    content = io.BytesIO()
    PICTURES[0].save(content, "PNG")
    for name in ("catch_warnings", "simplefilter", "filterwarnings"):
        monkeypatch.setattr(warnings, name, changed)
    assert captioner.caption(content.getvalue()).text


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_picture_that_pillow_warns_of_has_too_many_pixels(
    captioner: LocalCaptioner, action: Any
) -> None:
    content = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(content, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageTooManyPixelsError):
            captioner.caption(content.getvalue())


SPECIAL_TEXT = "<|endoftext|>"


@pytest.mark.parametrize("num_beams", [2, 4])
def test_a_special_token_in_a_text_is_text(captioner: LocalCaptioner, num_beams: int) -> None:
    options: dict[str, Any] = {"num_beams": num_beams, "max_length": 40, "min_length": 34}
    prefixed = captioner.caption(PICTURES[0], prefix=f"a {SPECIAL_TEXT} b", **options)
    assert prefixed.text.startswith(f"a {SPECIAL_TEXT} b")
    assert len(prefixed.text) > len(f"a {SPECIAL_TEXT} b")
    assert (
        SPECIAL_TEXT in captioner.caption(PICTURES[0], force_words=[SPECIAL_TEXT], **options).text
    )
    # To ban the end of a caption is not to ban these letters.
    banned = captioner.caption(PICTURES[0], bad_words=[SPECIAL_TEXT], num_beams=num_beams)
    assert banned == captioner.caption(PICTURES[0], num_beams=num_beams)


def test_a_forced_word_that_the_prefix_has_is_there(captioner: LocalCaptioner) -> None:
    plain = captioner.caption(PICTURES[0], prefix="a dog b", num_beams=3, max_length=10)
    words = ["a", "dog", "g b"]
    forced = captioner.caption(
        PICTURES[0], prefix="a dog b", num_beams=3, max_length=10, force_words=words[:2]
    )
    assert forced == plain
    with pytest.raises(InvalidOptionsError) as refused:
        # "g b" stands within a word there.
        captioner.caption(
            PICTURES[0], prefix="a dog b", num_beams=3, max_length=10, force_words=words
        )
    assert set(refused.value.field_violations) == {"force_words", "max_length"}


@pytest.fixture
def with_more_tokens(repository: Path) -> Path:
    """A repository whose tokenizer has tokens that the model does not know."""
    path = repository / "decoder" / "1" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["#unknown#"])
    tokenizer.add_special_tokens(["<pad>"])
    # As training leaves it; neither may reach what a caller writes.
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.save(str(path))
    return repository


@pytest.mark.parametrize("name", ["prefix", "bad_words", "force_words"])
def test_a_token_that_the_model_does_not_know_is_its_callers_fault(
    name: str, with_more_tokens: Path, captioner: LocalCaptioner
) -> None:
    def value(text: str) -> Any:
        return text if name == "prefix" else [text]

    options: dict[str, Any] = {"num_beams": 2, "max_length": 30}
    with LocalCaptioner(with_more_tokens, threads=1) as larger:
        with pytest.raises(InvalidOptionsError) as refused:
            larger.caption(PICTURES[0], **options, **{name: value("a #unknown# b")})
        assert set(refused.value.field_violations) == {name}
        # A special token's text is text, of tokens that the model knows.
        given = {name: value("<pad> and a few letters")}
        expected = captioner.caption(PICTURES[0], **options, **given)
        assert larger.caption(PICTURES[0], **options, **given) == expected


class FaultyOnce:
    """Lets one run of the graph that has an input of this name fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, input_name: str) -> None:
        self.failed = False
        run = OnnxGraph.run

        def faulty(graph: OnnxGraph, inputs: Mapping[str, Any], into: Any = None) -> Any:
            if input_name in inputs and not self.failed:
                self.failed = True
                raise RuntimeError("a secret of the runtime")
            return run(graph, inputs, into)

        monkeypatch.setattr(OnnxGraph, "run", faulty)


@pytest.mark.parametrize("input_name", [PIXELS, TOKENS])
def test_a_model_that_fails_does_not_stay_broken(
    input_name: str, captioner: LocalCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = captioner.caption(PICTURES[0])
    once = FaultyOnce(monkeypatch, input_name)
    with pytest.raises(ModelFaultError) as fault:
        captioner.caption(PICTURES[0])
    assert once.failed
    assert "secret" not in fault.value.message
    assert captioner.caption(PICTURES[0]) == expected


def test_an_older_export_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "decoder_step").mkdir()
    with pytest.raises(
        ModelFolderError, match=r"older export .*decoder_step.*export the checkpoint"
    ):
        LocalCaptioner(tmp_path)


def test_closing_ends_its_thread(model_repository: Callable[[str], Path]) -> None:
    before = set(threading.enumerate())
    with LocalCaptioner(model_repository(NAME), threads=1) as captioner:
        assert set(threading.enumerate()) - before
        captioner.caption(np.asarray(PICTURES[0]))
    assert set(threading.enumerate()) <= before
    with pytest.raises(ModelUnavailableError):
        captioner.caption(PICTURES[0])
