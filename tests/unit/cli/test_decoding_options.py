"""The decoding options on the command line, and the `caption` command that sends them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import typer
from captionserve import GenerationOptions
from captionserve.v1 import caption_pb2
from captionserve_server.cli.console import ExitCode
from captionserve_server.cli.decoding_options import with_decoding_options
from captionserve_server.cli.main import app as whole_app
from captionserve_server.core.options import OPTIONS
from typer.core import TyperOption
from typer.testing import CliRunner

from tests.unit.client.caption_server import (
    RecordingServicer,
    caption_server,
    good_response,
    good_stream,
)

# Each option as it is typed, and its value.
TYPED: dict[str, tuple[list[str], Any]] = {
    "num_beams": (["--num-beams", "4"], 4),
    "max_length": (["--max-length", "20"], 20),
    "min_length": (["--min-length", "3"], 3),
    "max_new_tokens": (["--max-new-tokens", "15"], 15),
    "min_new_tokens": (["--min-new-tokens", "2"], 2),
    "length_penalty": (["--length-penalty", "-0.5"], -0.5),
    "early_stopping": (["--early-stopping", "never"], "never"),
    "num_return_sequences": (["--num-return-sequences", "2"], 2),
    "do_sample": (["--do-sample"], True),
    "temperature": (["--temperature", "0.7"], 0.7),
    "top_k": (["--top-k", "0"], 0),
    "top_p": (["--top-p", "0.9"], 0.9),
    "min_p": (["--min-p", "0.1"], 0.1),
    "seed": (["--seed", str(2**63 - 1)], 2**63 - 1),
    "num_beam_groups": (["--num-beam-groups", "2"], 2),
    "diversity_penalty": (["--diversity-penalty", "0.25"], 0.25),
    "repetition_penalty": (["--repetition-penalty", "1.3"], 1.3),
    "no_repeat_ngram_size": (["--no-repeat-ngram-size", "2"], 2),
    "bad_words": (["--bad-word", "a cat", "--bad-word", "dog"], ["a cat", "dog"]),
    "force_words": (["--force-word", "a red"], ["a red"]),
    "prefix": (["--prefix", "a photo of"], "a photo of"),
    "suppress_tokens": (["--suppress-token", "0", "--suppress-token", "7"], [0, 7]),
    "output_attentions": (["--attention"], True),
    "allow_partial": (["--allow-partial"], True),
    "output_grounding": (["--grounding"], True),
    "rerank": (["--rerank", "grounding"], "grounding"),
    "min_confidence": (["--min-confidence", "0.5"], 0.5),
    "output_beams": (["--beams"], True),
    "output_stages": (["--stages"], True),
}


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: str | int | None
    stdout: str
    stderr: str


Caption = Callable[..., Ended]
Server = tuple[str, RecordingServicer]


def parsed(*arguments: str) -> GenerationOptions:
    """The options that a command gets.

    Raises:
        typer.BadParameter: if the arguments are wrong usage.
    """
    app = typer.Typer()
    given: list[GenerationOptions] = []

    @app.command()
    @with_decoding_options
    def command(*, options: GenerationOptions) -> None:
        given.append(options)

    CliRunner().invoke(app, arguments, standalone_mode=False, catch_exceptions=False)
    (options,) = given
    return options


def test_every_option_can_be_typed() -> None:
    assert set(TYPED) == {field.name for field in dataclasses.fields(GenerationOptions)}


def test_help_says_what_the_core_says_of_each_option() -> None:
    app = typer.Typer()

    @app.command()
    @with_decoding_options
    def command(*, options: GenerationOptions) -> None:
        """Nothing."""

    helps = {
        each.name: str(each.help)
        for each in typer.main.get_command(app).params
        if isinstance(each, TyperOption)
    }
    for name, option in OPTIONS.items():
        assert helps[name].startswith(option.help)
        assert option.range() in helps[name]


def test_options_that_are_not_typed_are_unset() -> None:
    assert parsed() == GenerationOptions()


@pytest.mark.parametrize("name", TYPED)
def test_each_option_is_read(name: str) -> None:
    arguments, value = TYPED[name]
    assert parsed(*arguments) == GenerationOptions(**{name: value})


def test_all_options_are_read_together() -> None:
    arguments = [word for words, _ in TYPED.values() for word in words]
    values = {name: value for name, (_, value) in TYPED.items()}
    assert parsed(*arguments) == GenerationOptions(**values)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("never", "never")])
def test_early_stopping_is_typed_as_text(text: str, value: Any) -> None:
    assert parsed("--early-stopping", text) == GenerationOptions(early_stopping=value)


def test_sampling_can_be_switched_off() -> None:
    assert parsed("--no-do-sample") == GenerationOptions(do_sample=False)


def test_other_ways_of_early_stopping_are_wrong_usage() -> None:
    with pytest.raises(typer.BadParameter, match="must be true, false or never"):
        parsed("--early-stopping", "sometimes")


@pytest.mark.parametrize(
    "arguments",
    [["--num-beams", "four"], ["--temperature", "warm"], ["--suppress-token", "dog"]],
)
def test_text_where_a_number_is_wanted_is_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        parsed(*arguments)


@pytest.fixture
def server() -> Iterator[Server]:
    with caption_server() as (target, servicer):
        servicer.many = servicer.answer_each
        yield target, servicer


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two files; the name of the first reads like markup and an emoji."""
    paths = [tmp_path / "[red]:dog:.jpg", tmp_path / "second.jpg"]
    for path in paths:
        path.write_bytes(b"an image")
    return [str(path) for path in paths]


@pytest.fixture
def caption(capsys: pytest.CaptureFixture[str]) -> Caption:
    """`captionserve caption` with the arguments that it is called with."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            whole_app(["caption", *arguments])
        return Ended(ended.value.code, *capsys.readouterr())

    return run


def test_options_are_sent(server: Server, caption: Caption, images: list[str]) -> None:
    target, servicer = server
    arguments = ("--target", target, "--num-beams", "4", "--bad-word", "cat")
    assert caption(images[0], *arguments).exit_code == ExitCode.OK
    assert caption(images[0], *arguments, "--stream").exit_code == ExitCode.OK
    assert caption(images[0], *arguments, "--bypass-cache").exit_code == ExitCode.OK
    expected = caption_pb2.GenerationOptions(
        num_beams=4, bad_words=caption_pb2.StringList(values=["cat"])
    )
    assert [request.options for request in servicer.requests] == [expected] * 3
    assert [request.bypass_cache for request in servicer.requests] == [False, False, True]


def test_captions_are_printed_as_they_are(
    server: Server, caption: Caption, images: list[str]
) -> None:
    target, servicer = server
    response = good_response()
    response.captions[0].text = "[bold] a :cat:"
    servicer.answer = lambda request, context: response
    assert caption(images[0], "--target", target).stdout.splitlines() == [
        f"{images[0]}: [bold] a :cat: (-0.500) needs review: low_confidence",
        f"{images[0]}: an apple (-0.750)",
    ]


def test_json_holds_the_whole_result(server: Server, caption: Caption, images: list[str]) -> None:
    (answer,) = json.loads(caption(images[0], "--target", server[0], "--json").stdout)
    best, second = answer["captions"]
    assert (answer["image"], answer["cached"]) == (images[0], True)
    assert best == {
        "text": "a red apple",
        "score": -0.5,
        "token_ids": [5, 6, 2],
        "token_logprobs": [-0.25, -0.25, -0.5],
        "finish_reason": "eos",
        "token_texts": ["a red", " apple", ""],
        "confidence": 0.75,
        "degenerate": False,
        "attention": [[[0.5, 0.25]], [[0.0, 1.0]], [[0.125, 0.125]]],
        "words": [
            {
                **{"text": "red", "first_token": 0, "tokens": 1},
                "confidence": 0.875,
                "grounding": 2.0,
            },
            {
                **{"text": "apple", "first_token": 1, "tokens": 1},
                "confidence": 0.5,
                "grounding": 4.0,
            },
        ],
        "token_groundings": [2.0, 4.0, 0.0],
        "grounding": 2.0,
        "needs_review": True,
        "review_reasons": ["low_confidence"],
    }
    assert second["finish_reason"] == "deadline"
    assert not {"attention", "token_groundings", "grounding"} & second.keys()
    assert second["words"] == [{"text": "apple", "first_token": 0, "tokens": 1, "confidence": 0.25}]


def test_a_stream_is_one_line_for_each_image(
    server: Server, caption: Caption, images: list[str]
) -> None:
    result = caption(*images, "--target", server[0], "--stream")
    assert result.stdout.splitlines() == [f"{image}: a red apple" for image in images]


def test_a_broken_stream_ends_its_line(server: Server, caption: Caption, images: list[str]) -> None:
    target, servicer = server

    def fail_once(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        yield good_stream()[0]
        if len(servicer.requests) == 1:
            context.abort(grpc.StatusCode.INTERNAL, "a sentence")
        yield from good_stream()[1:]

    servicer.stream = fail_once
    result = caption(*images, "--target", target, "--stream")
    assert result.exit_code == ExitCode.CALL_FAILED
    assert result.stdout.splitlines() == [f"{images[0]}: a red", f"{images[1]}: a red apple"]
    assert result.stderr.splitlines() == [f"{images[0]}: INTERNAL: a sentence"]


def test_a_stream_that_never_began_leaves_no_line(
    server: Server, caption: Caption, images: list[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.jpg")
    result = caption(missing, images[1], "--target", server[0], "--stream")
    assert result.exit_code == ExitCode.CALL_FAILED
    assert result.stdout.splitlines() == [f"{images[1]}: a red apple"]
    assert result.stderr.startswith(f"{missing}: UNREADABLE")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stream", "--json"],
        ["--num-beams", str(2**31)],
        ["--seed", str(2**63)],
        ["--seed", str(2**63), "--stream"],
        ["--timeout", "inf"],
        ["--early-stopping", "sometimes"],
    ],
)
def test_what_cannot_be_asked_is_wrong_usage(
    server: Server, caption: Caption, images: list[str], arguments: list[str]
) -> None:
    target, servicer = server
    result = caption(images[0], "--target", target, *arguments)
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert "Invalid value" in result.stderr
    assert servicer.requests == []
