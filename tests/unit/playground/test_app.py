"""What the page's server answers, and what it refuses."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from captionserve import CaptionError, GenerationOptions
from captionserve_server import playground
from captionserve_server.core.options import OPTIONS, DecodingOptions
from captionserve_server.playground.app import Bounds, files

from tests.unit.playground.harness import HEADERS, Told, body, events, page

PAGE = Path(playground.__file__).parent / "page"
WAIT_SECONDS = 20.0


def test_words_come_as_lines_and_the_result_last() -> None:
    told = Told()
    with page(told) as visitor:
        response = visitor.post(
            "/api/caption",
            content=body(b"\n\nbytes\n", options={"num_beams": 2}, tiles=[1, 2]),
            headers=HEADERS,
        )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/x-ndjson")
    *words, last = events(response.text)
    step = [
        {
            **{"parent": 0, "token_id": 4, "token_text": "a", "token_logprob": -0.5},
            **{"score": -0.5, "fate": "kept", "beam": 0},
        },
        {
            **{"parent": 0, "token_id": 6, "token_text": "", "token_logprob": -2.5},
            **{"score": -2.5, "fate": "dropped", "beam": None},
        },
    ]
    assert words == [{"text": "a", "beam_steps": []}, {"text": " café", "beam_steps": [step]}]
    assert last["result"]["captions"][0]["token_texts"] == ["a", " café"]
    assert last["result"]["captions"][0]["finish_reason"] == "eos"
    # No number of JSON's.
    assert last["result"]["captions"][0]["score"] is None
    assert last["seconds"] >= 0
    # The first line alone is what is asked: an image may have any bytes.
    assert told.asked == [(b"\n\nbytes\n", GenerationOptions(num_beams=2), {"tiles": [1, 2]})]


def test_a_failed_call_is_told_with_reason_and_fields_behind_its_words() -> None:
    told = Told()
    told.error = CaptionError(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTIONS", "no", {"options.top_k": "too small"}
    )
    with page(told) as visitor:
        response = visitor.post("/api/caption", content=body(), headers=HEADERS)
        assert visitor.get("/api/model").json()["error"]["reason"] == "INVALID_OPTIONS"
    assert events(response.text) == [
        {"text": "a", "beam_steps": []},
        {
            "error": {
                "code": "INVALID_ARGUMENT",
                "reason": "INVALID_OPTIONS",
                "message": "no",
                "fields": {"options.top_k": "too small"},
            }
        },
    ]


def test_the_options_are_the_cores_own() -> None:
    with page(Told()) as visitor:
        told = visitor.get("/api/options").json()["options"]
    assert [each["name"] for each in told] == list(OPTIONS)
    defaults = DecodingOptions().as_given()
    for each in told:
        option = OPTIONS[each["name"]]
        assert each["help"] == option.help
        assert each["range"] == option.range()
        assert each["kind"] == option.kind.__name__
        assert (each["least"], each["most"]) == (option.least, option.most)
        assert each["is_list"] is (option.max_items is not None)
        assert each["words"] == list(option.words)
        assert each["default"] == json.loads(json.dumps(defaults.get(each["name"])))


def test_facts_come_with_what_a_visitor_may_ask() -> None:
    with page(Told(), Bounds(image_bytes=77, at_once=3)) as visitor:
        facts = visitor.get("/api/model").json()
    assert facts["where"] == "here"
    assert facts["bounds"] == {"image_bytes": 77, "at_once": 3}


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", 400, "INVALID_REQUEST"),
        (b"an image without a line before it", 400, "INVALID_REQUEST"),
        (b"{}\nimage", 400, "INVALID_REQUEST"),
        (b"[1]\nimage", 400, "INVALID_REQUEST"),
        (b'{"options": 3}\nimage', 400, "INVALID_REQUEST"),
        (b"[" * 100_000 + b"\nimage", 400, "INVALID_REQUEST"),
        (b'{"options": {"beams": 3}}\nimage', 400, "INVALID_OPTIONS"),
        (b'{"options": {}, "more": 1}\nimage', 400, "INVALID_REQUEST"),
    ],
    ids=range(8),
)
def test_what_is_no_question_is_refused(content: bytes, status: int, reason: str) -> None:
    told = Told()
    with page(told) as visitor:
        response = visitor.post("/api/caption", content=content, headers=HEADERS)
        assert response.status_code == status
        assert response.json()["error"]["reason"] == reason
        assert response.json()["error"]["message"]
        assert not told.asked
        # Nothing of it is left in work.
        for _ in range(20):
            assert visitor.post("/api/caption", content=body(), headers=HEADERS).status_code == 200


def test_too_large_an_image_is_refused_before_it_is_read_and_while_it_is() -> None:
    told = Told()
    with page(told, Bounds(image_bytes=1000)) as visitor:

        def chunks() -> Any:
            yield body()
            for _ in range(1000):
                yield bytes(2000)

        for content in (body(bytes(1001)), body(bytes(400_000)), chunks()):
            response = visitor.post("/api/caption", content=content, headers=HEADERS)
            assert response.status_code == 413
            assert response.json()["error"]["reason"] == "IMAGE_TOO_LARGE"
        assert not told.asked
        response = visitor.post("/api/caption", content=body(bytes(1000)), headers=HEADERS)
        assert response.status_code == 200


def test_a_caption_that_takes_too_long_is_ended() -> None:
    told = Told()
    told.hold = True
    with page(told, Bounds(caption_seconds=0.2)) as visitor:
        response = visitor.post("/api/caption", content=body(), headers=HEADERS)
        assert events(response.text)[-1]["error"]["reason"] == "DEADLINE_EXCEEDED"
        assert told.ended == 1


def test_one_more_caption_than_may_be_in_work_is_refused() -> None:
    told = Told()
    told.hold = True
    with page(told, Bounds(at_once=2, caption_seconds=3.0)) as visitor:
        threads = [
            threading.Thread(
                target=lambda: visitor.post("/api/caption", content=body(), headers=HEADERS)
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(told.asked) < 2:
            assert time.monotonic() < deadline
        response = visitor.post("/api/caption", content=body(), headers=HEADERS)
        assert response.status_code == 429
        assert response.json()["error"]["reason"] == "OVERLOADED"
        for thread in threads:
            thread.join()
        # And room is made again.
        told.hold = False
        assert visitor.post("/api/caption", content=body(), headers=HEADERS).status_code == 200


def test_the_files_of_the_page_are_there_with_their_types() -> None:
    with page(Told()) as visitor:
        for path, (content, kind) in files().items():
            response = visitor.get(path)
            assert response.content == content
            assert response.headers["content-type"].partition(";")[0] == kind
        assert visitor.get("/app.py").status_code == 404
        assert visitor.get("/../app.py").status_code == 404
        samples = visitor.get("/samples/index.json").json()
        assert len(samples) == 7
        for path in samples:
            assert visitor.get(path).headers["content-type"] == "image/webp"


def test_the_page_is_light_and_asks_no_other_host() -> None:
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 80 * 1024
    names = {file.name for file in PAGE.iterdir()}
    for file in PAGE.iterdir():
        text = file.read_text()
        # Names of XML's own are no addresses that anybody asks.
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, file
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in names
        assert "innerHTML" not in text
        if file.suffix == ".html":
            assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)


def alt_text(**asked: Any) -> bytes:
    caption = {"text": "a photo of a dog on a red mat", "confidence": 0.9, "degenerate": False}
    whole = {"caption": caption, "max_chars": 125, "nearby_text": None, "file_name": "x.jpg"}
    return json.dumps(whole | asked).encode()


def test_an_alt_text_is_the_clients_own() -> None:
    with page(Told()) as visitor:
        response = visitor.post("/api/alt-text", content=alt_text(max_chars=9), headers=HEADERS)
    draft = response.json()
    assert draft["text"] == "A dog"
    assert draft["removed"] == ["a photo of"]
    assert draft["truncated"] is True


@pytest.mark.parametrize(
    "asked",
    [
        {"max_chars": 0},
        {"max_chars": "9"},
        {"caption": None},
        {"caption": {"text": 3, "confidence": 1, "degenerate": False}},
        {"caption": {"text": "a dog"}},
    ],
    ids=str,
)
def test_an_alt_text_without_caption_or_room_is_refused(asked: dict[str, Any]) -> None:
    with page(Told()) as visitor:
        response = visitor.post("/api/alt-text", content=alt_text(**asked), headers=HEADERS)
        assert response.status_code == 400
        assert visitor.post("/api/alt-text", content=b"[", headers=HEADERS).status_code == 400


def test_nothing_is_remembered_of_a_visitor() -> None:
    with page(Told()) as visitor:
        for response in (
            visitor.get("/"),
            visitor.get("/api/model"),
            visitor.post("/api/caption", content=body(), headers=HEADERS),
        ):
            assert "set-cookie" not in response.headers
            assert response.headers["cache-control"] == "no-store"
