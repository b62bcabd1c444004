"""The pipelines do what transformers 4.57's own does: one table of calls, run with each.

Theirs runs in a process that has its packages before ours; they are fetched once and kept.
"""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import captionserve
import captionserve_server.local
import pytest
from captionserve_server.bench.programs import ProgramError, packages_in
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO
from tests.pictures import pictures
from tests.pipeline import calls

ROOT = Path(__file__).parent.parent.parent
# PyTorch, Pillow, numpy and what else transformers needs are those of the tests.
PACKAGES = (
    "transformers==4.57.6",
    "huggingface-hub==0.36.0",
    "tokenizers==0.22.1",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.3",
    "idna==3.20",
    "certifi==2026.10.19.post1",
)
TIMEOUT_SECONDS = 600.0
CALL_SECONDS = 120.0

Outcomes = dict[str, Any]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and writes nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[calls.Place]:
    """The images and files of the table, also on the web."""
    folder = tmp_path_factory.mktemp("images")
    scenes = pictures(DEMO, len(calls.IMAGES))
    for name, scene in zip(calls.IMAGES, scenes, strict=True):
        scene.save(folder / name)
    calls.prepare(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield calls.Place(folder, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


@pytest.fixture(scope="module")
def theirs(place: calls.Place, checkpoint_folder: Callable[[str], Path]) -> Outcomes:
    """What transformers 4.57 answers."""
    try:
        packages = packages_in(ROOT / "build" / "transformers-4.57", *PACKAGES)
    except ProgramError as error:
        pytest.skip(f"transformers 4.57 cannot be had: {error}")
    script, checkpoint = str(Path(calls.__file__)), str(checkpoint_folder(DEMO))
    process = subprocess.run(
        [sys.executable, script, str(packages), checkpoint, str(place.folder), place.url],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout)
    assert said["version"].startswith("4.57.")
    found: Outcomes = said["outcomes"]
    return found


@pytest.fixture(scope="module", params=["service", "edge mode"])
def ours(
    request: pytest.FixtureRequest,
    place: calls.Place,
    service: Callable[[str], ReadyReport],
    model_repository: Callable[[str], Path],
) -> Outcomes:
    """What ours answer."""
    if request.param == "service":
        pipe = captionserve.pipeline(
            "image-to-text",
            model=service(DEMO).grpc,
            call_timeout=CALL_SECONDS,
            allow_urls=True,
        )
    else:
        pipe = captionserve_server.local.pipeline(
            "image-to-text", model=model_repository(DEMO), allow_urls=True
        )
    with pipe, pytest.warns(UserWarning, match="without do_sample=True these change nothing"):
        found: Outcomes = json.loads(json.dumps(calls.outcomes(pipe, place)))
    return found


def without_outer_spaces(value: Any) -> Any:
    """A result whose texts neither begin nor end with spaces, as theirs may."""
    if isinstance(value, list):
        return [without_outer_spaces(each) for each in value]
    if isinstance(value, dict):
        return {name: text.strip() for name, text in value.items()}
    return value


def known_type(names: list[str]) -> str:
    """What a caller can catch an error by who does not know whose it is: Python's or Pillow's."""
    return next(n for n in names if n == "UnidentifiedImageError" or hasattr(builtins, n))


@pytest.mark.parametrize("name", calls.INPUTS | calls.KEYWORDS)
def test_results_are_theirs(name: str, theirs: Outcomes, ours: Outcomes) -> None:
    assert "result" in theirs[name], theirs[name]
    assert ours[name] == {"result": without_outer_spaces(theirs[name]["result"])}


@pytest.mark.parametrize("name", calls.REFUSALS)
def test_errors_are_caught_as_theirs(name: str, theirs: Outcomes, ours: Outcomes) -> None:
    assert "error" in theirs[name], theirs[name]
    assert "error" in ours[name], ours[name]
    assert known_type(theirs[name]["error"]) in ours[name]["error"]


@pytest.mark.parametrize("name", calls.HALVES)
def test_results_before_an_error_are_theirs(name: str, theirs: Outcomes, ours: Outcomes) -> None:
    their_results, their_error = theirs[name]["result"]
    our_results, our_error = ours[name]["result"]
    assert our_results == without_outer_spaces(their_results)
    assert known_type(their_error) in our_error


def test_batches_do_not_mix_the_sequences_of_images(theirs: Outcomes, ours: Outcomes) -> None:
    # Should this end one day, the pipeline's page has to be told.
    mixed, alone = "several sequences in batches", "several sequences of a list"
    assert theirs[mixed] != theirs[alone]
    assert ours[mixed] == ours[alone]
    assert ours[mixed] == {"result": without_outer_spaces(theirs[alone]["result"])}


def test_the_texts_tell_images_and_ways_apart(theirs: Outcomes) -> None:
    # Else agreement would say little.
    texts = {each[0]["generated_text"] for each in theirs["list"]["result"]}
    assert len(texts) == len(calls.IMAGES)
    few, all_of_it = theirs["max_new_tokens"]["result"], theirs["list"]["result"]
    assert few != all_of_it
    assert theirs["least lengths"]["result"] != all_of_it
    assert theirs["grey"]["result"] != theirs["path"]["result"]
