"""The decoder model on a stand-in of Triton: who is answered, how often, and what fails alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve_server.runtime.open_graph import find_graph, open_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Repositories
from tests.pictures import png
from tests.reference import picture
from tests.unit.triton.answered import WAIT_SECONDS, answer_of, error_of, wait_until
from tests.unit.triton.stand_in import (
    InferenceRequest,
    InferenceResponse,
    Logger,
    MetricFamily,
    Tensor,
    outputs_of,
    request_of,
)


class Setup:
    """A decoder of a small checkpoint, with its encoder's graph in the place of vision_encoder."""

    def __init__(self, repository: Path, **parameters: int) -> None:
        # Imported here, when the stand-in is in its place.
        from captionserve_server.triton.decoder import TritonPythonModel

        folder = repository / "vision_encoder" / "1"
        self._graph = open_graph(find_graph(folder, "model.onnx"), threads=1)
        self.encoder_fails = 0
        InferenceRequest.models["vision_encoder"] = self._encode
        numbers = {
            "slots": 4,
            "max_rows": 16,
            "max_entries": 2048,
            "max_admissions": 2,
            "max_requests": 64,
            "image_threads": 2,
            "intra_op_thread_count": 1,
            "spinning": 0,
        } | parameters
        config = {
            "parameters": {name: {"string_value": str(n)} for name, n in numbers.items()},
        }
        self.model = TritonPythonModel()
        self.model.initialize(
            {
                "model_config": json.dumps(config),
                "model_name": "decoder",
                "model_repository": str(repository / "decoder"),
                "model_version": "1",
            }
        )

    def _encode(self, request: InferenceRequest) -> Iterable[InferenceResponse]:
        if self.encoder_fails:
            self.encoder_fails -= 1
            raise RuntimeError("the encoder fails")
        (states,) = self._graph.run({"PIXELS": request.tensors["PIXELS"].as_numpy()})
        yield InferenceResponse([Tensor("ENCODER_STATES", states)])

    def ask(self, **inputs: Any) -> InferenceRequest:
        """Send a request; a picture and short captions where nothing else is said."""
        request = request_of(**({"IMAGE": IMAGE, "OPTIONS": SHORT} | inputs))
        self.model.execute([request])
        return request

    @property
    def unanswered(self) -> int:
        return self.model._answering.unanswered

    @property
    def running(self) -> int:
        return self.model._engine._scheduler.running


IMAGE = png(picture(1))
SHORT = json.dumps({"num_beams": 2, "max_length": 6})


@pytest.fixture
def setup(model_repository: Repositories) -> Iterator[Setup]:
    made = Setup(model_repository("projected"))
    yield made
    made.model.finalize()


def test_a_message_is_answered_with_every_tensor_of_a_caption(setup: Setup) -> None:
    outputs = outputs_of(answer_of(setup.ask()))
    from captionserve_server.triton import wire

    names = {spec.name for spec in wire.ANSWER} - {spec.name for spec in wire.WHERE_ASKED_FOR}
    assert set(outputs) == names
    assert outputs["TOKEN_IDS"].shape == outputs["TOKEN_LOGPROBS"].shape
    assert setup.unanswered == 0


def test_a_history_is_answered_where_it_is_asked_for(setup: Setup) -> None:
    asked = json.dumps({"num_beams": 3, "max_length": 8, "output_beams": True})
    outputs = outputs_of(answer_of(setup.ask(OPTIONS=asked)))
    told = json.loads(outputs["BEAMS"][0])
    tokens = outputs["TOKEN_IDS"][0].tolist()
    walked = [
        step["token_ids"][at]
        for step, at in zip(told["steps"], told["paths"][0]["continuations"], strict=False)
    ]
    assert walked == tokens
    for step in told["steps"]:
        assert len({len(column) for column in step.values()}) == 1
        assert len(step["parents"]) <= 2 * 3


def test_a_stream_and_a_plain_call_say_the_same(setup: Setup) -> None:
    plain, stream = setup.ask(), setup.ask(STREAM=True)
    final = outputs_of(answer_of(plain))
    answer_of(stream)
    *parts, last = [outputs_of(response) for response in stream.sender.responses]
    assert last["TEXT"][0] == final["TEXT"][0]
    tokens = np.concatenate([part["NEW_TOKEN_IDS"] for part in parts])
    assert tokens.tolist() == final["TOKEN_IDS"][0].tolist()


@pytest.mark.parametrize("tiles", [None, [2, 1]])
def test_a_stream_tells_of_the_wholes_search_step_by_step_where_that_is_asked_for(
    setup: Setup, tiles: list[int] | None
) -> None:
    parts_of_image = {} if tiles is None else {"TILES": np.array(tiles, np.int32)}
    asked = json.dumps({"num_beams": 3, "max_length": 8, "output_beams": True})
    stream = setup.ask(OPTIONS=asked, STREAM=True, **parts_of_image)
    answer_of(stream)
    *parts, last = [outputs_of(response) for response in stream.sender.responses]
    told = [json.loads(part["NEW_BEAM_STEPS"][0]) for part in parts]
    assert list(itertools.chain(*told)) == json.loads(last["BEAMS"][0])["steps"]
    assert [len(steps) for steps in told] == [1] * len(parts)
    unasked = setup.ask(STREAM=True)
    answer_of(unasked)
    responses = map(outputs_of, unasked.sender.responses)
    assert all("NEW_BEAM_STEPS" not in response for response in responses)


@pytest.mark.parametrize("max_length", [2, 3, 5, 17, 34])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefix": "a \u00e9 "}])
def test_the_parts_of_a_stream_add_up_to_the_text(
    setup: Setup, max_length: int, options: dict[str, Any]
) -> None:
    # The tokens of this checkpoint are bytes, so that captions end within characters.
    given = {"max_length": max_length + 6, "min_length": max_length + 6, **options}
    for seed in range(3):
        stream = setup.ask(IMAGE=png(picture(seed)), OPTIONS=json.dumps(given), STREAM=True)
        answer_of(stream)
        *parts, last = [outputs_of(response) for response in stream.sender.responses]
        assert b"".join(part["NEW_TEXT"][0] for part in parts) == last["TEXT"][0]


class NoText(InferenceRequest):
    """A request whose id is no UTF-8, as Triton takes it over HTTP."""

    def request_id(self) -> str:
        return b"\xff".decode()


def test_a_request_whose_id_is_no_text_is_answered_like_any(setup: Setup) -> None:
    neighbour = request_of(IMAGE=IMAGE, OPTIONS=SHORT)
    nameless = NoText(request_of(IMAGE=IMAGE, OPTIONS=SHORT).tensors.values())
    setup.model.execute([nameless, neighbour])
    assert outputs_of(answer_of(nameless))["TEXT"] == outputs_of(answer_of(neighbour))["TEXT"]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (b"\xff", {"options"}),
        (b'{"prefix": "\xff"}', {"options"}),
        (b'{"prefix": "\\ud800"}', {"prefix"}),
        (b'{"\\ud800": 1}', {"\\ud800"}),
        (b'{"seed": ' + b"9" * 400 + b', "do_sample": true}', {"seed"}),
        (b'{"max_length": -' + b"9" * 9000 + b"}", {"max_length"}),
        (b'{"num_beams": true}', {"num_beams"}),
        (b'{"repetition_penalty": 1e-46}', {"repetition_penalty"}),
        (b'{"suppress_tokens": [301]}', {"suppress_tokens"}),
    ],
    ids=range(9),
)
def test_what_no_caller_of_the_gateway_can_send_is_refused_by_its_field(
    setup: Setup, options: bytes, fields: set[str]
) -> None:
    neighbour = setup.ask()
    error = error_of(setup.ask(OPTIONS=options))
    assert error.reason == "INVALID_OPTIONS"
    assert set(error.field_violations) == fields
    assert not answer_of(neighbour).has_error()


def test_pixel_values_of_the_processor_give_the_caption_of_the_file(setup: Setup) -> None:
    from captionserve_server.core.preprocessing import preprocess

    config = setup.model._preprocessor
    pixels = preprocess(IMAGE, config).whole.astype(np.float32)
    mean, std = (
        np.array(of, np.float32)[:, None, None] for of in (config.image_mean, config.image_std)
    )
    values = (pixels * np.float32(config.rescale_factor) - mean) / std
    request = request_of(PIXEL_VALUES=values.astype(np.float32), OPTIONS=SHORT)
    setup.model.execute([request])
    expected = outputs_of(answer_of(setup.ask()))
    assert outputs_of(answer_of(request))["TOKEN_IDS"].tolist() == expected["TOKEN_IDS"].tolist()


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"OPTIONS": '{"num_beams": 0}'}, "INVALID_OPTIONS"),
        ({"OPTIONS": "[]"}, "INVALID_OPTIONS"),
        ({"IMAGE": b"no image"}, "UNSUPPORTED_IMAGE_FORMAT"),
        ({"PIXEL_VALUES": np.zeros((3, 4, 4), np.float32)}, "INVALID_REQUEST"),
        ({"REGIONS": np.zeros((1, 4), np.int32)}, "INVALID_FRAMING"),
        # Beyond the picture, which is 60 x 44.
        ({"REGIONS": np.array([[0, 0, 60, 45]], np.int32)}, "INVALID_FRAMING"),
        ({"TILES": np.array([5, 5], np.int32)}, "INVALID_FRAMING"),
        ({"RESIZE": "squash"}, "INVALID_FRAMING"),
        ({"RESIZE": b"\xff"}, "INVALID_FRAMING"),
        ({"REGIONS": np.array([[0, 0, 9, 9]], np.int32), "IMAGE": IMAGE[:99]}, "IMAGE_CORRUPT"),
    ],
)
def test_a_wrong_message_is_told_and_takes_no_room(
    setup: Setup, inputs: dict[str, Any], reason: str
) -> None:
    assert error_of(setup.ask(**inputs)).reason == reason
    wait_until(lambda: setup.unanswered == 0)


def test_parts_are_captioned_as_files_of_their_pixels_would_be(setup: Setup) -> None:
    boxes = [(5, 3, 41, 44), (0, 0, 1, 1), (5, 3, 41, 44)]
    asked = setup.ask(
        REGIONS=np.array(boxes, np.int32),
        TILES=np.array([1, 2], np.int32),
        RESIZE="letterbox",
        OPTIONS=json.dumps({"num_beams": 2, "num_return_sequences": 2, "max_length": 12}),
    )
    outputs = outputs_of(answer_of(asked))
    boxes += [(0, 0, 30, 44), (30, 0, 60, 44)]
    assert outputs["REGION_BOXES"].tolist() == [list(box) for box in boxes]
    assert outputs["REGION_CAPTIONS"].tolist() == [2] * 5
    alone = [
        outputs_of(
            answer_of(
                setup.ask(
                    IMAGE=png(picture(1).crop(box)),
                    RESIZE="letterbox",
                    OPTIONS=json.dumps(
                        {"num_beams": 2, "num_return_sequences": 2, "max_length": 12}
                    ),
                )
            )
        )
        for box in [(0, 0, 60, 44), *boxes]
    ]
    assert outputs["TEXT"].tolist() == [text for each in alone for text in each["TEXT"]]
    np.testing.assert_allclose(
        outputs["SCORE"], np.concatenate([each["SCORE"] for each in alone]), atol=1e-5
    )
    wait_until(lambda: setup.unanswered == 0 and setup.running == 0)


def test_attention_that_fits_into_no_answer_is_refused(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captionserve_server.triton import decoder

    # Of 4 x 4 patches, 4 bytes each: 2 captions of 12 tokens for the whole and 2 parts.
    monkeypatch.setattr(decoder, "_MAX_ATTENTION_BYTES", 3 * 2 * 12 * 16 * 4)
    given = {"num_beams": 2, "num_return_sequences": 2, "max_length": 12, "output_attentions": True}
    fits = setup.ask(TILES=np.array([1, 2], np.int32), OPTIONS=json.dumps(given))
    assert outputs_of(answer_of(fits))["ATTENTIONS"].nbytes <= decoder._MAX_ATTENTION_BYTES
    error = error_of(setup.ask(TILES=np.array([1, 3], np.int32), OPTIONS=json.dumps(given)))
    assert set(error.field_violations) == {"output_attentions"}
    without = json.dumps(given | {"output_attentions": False})
    plain = setup.ask(TILES=np.array([1, 3], np.int32), OPTIONS=without)
    assert not answer_of(plain).has_error()
    wait_until(lambda: setup.unanswered == 0)


def test_pixel_values_have_no_parts(setup: Setup) -> None:
    request = request_of(
        PIXEL_VALUES=np.zeros((3, 32, 32), np.float32), TILES=np.array([1, 1], np.int32)
    )
    setup.model.execute([request])
    error = error_of(request)
    assert error.reason == "INVALID_FRAMING"
    assert set(error.field_violations) == {"tiles"}


def test_a_stream_tells_the_wholes_words_and_the_parts_at_the_end(setup: Setup) -> None:
    plain = outputs_of(answer_of(setup.ask()))
    stream = setup.ask(STREAM=True, TILES=np.array([2, 2], np.int32))
    answer_of(stream)
    *parts, last = [outputs_of(response) for response in stream.sender.responses]
    tokens = np.concatenate([part["NEW_TOKEN_IDS"] for part in parts])
    assert tokens.tolist() == plain["TOKEN_IDS"][0].tolist()
    assert last["TEXT"][0] == plain["TEXT"][0]
    assert len(last["TEXT"]) == 5


def test_a_question_with_parts_takes_its_whole_room_or_none(
    model_repository: Repositories,
) -> None:
    setup = Setup(model_repository("projected"), max_requests=4)
    refused = setup.ask(TILES=np.array([2, 2], np.int32))
    assert error_of(refused).reason == "OVERLOADED"
    taken = setup.ask(TILES=np.array([1, 3], np.int32))
    assert not answer_of(taken).has_error()
    wait_until(lambda: setup.unanswered == 0)
    setup.model.finalize()


def test_it_says_which_version_it_is_and_what_its_defaults_are(setup: Setup) -> None:
    request = request_of(DESCRIBE=True)
    setup.model.execute([request])
    description = json.loads(outputs_of(answer_of(request))["DESCRIPTION"][0])
    assert description["version"] == 1
    assert description["defaults"] == setup.model._bundle.defaults.as_given()


def test_one_more_than_there_is_room_for_is_refused(model_repository: Repositories) -> None:
    setup = Setup(model_repository("projected"), max_requests=1)
    long = json.dumps({"num_beams": 4, "max_length": 30, "min_length": 30})
    first = setup.ask(OPTIONS=long)
    refused = setup.ask()
    assert error_of(refused).reason == "OVERLOADED"
    assert not answer_of(first).has_error()
    wait_until(lambda: setup.unanswered == 0)
    setup.model.finalize()


def test_a_caller_that_has_gone_gives_its_room_back(setup: Setup) -> None:
    long = json.dumps({"num_beams": 4, "max_length": 30, "min_length": 30})
    requests = [setup.ask(OPTIONS=long) for _ in range(8)]
    requests[0].sender.cancelled = True
    named = request_of("the-last", IMAGE=IMAGE, OPTIONS=long)
    setup.model.execute([named])
    setup.model.execute([request_of(CANCEL="the-last")])
    assert error_of(named).reason == "CANCELLED"
    for request in requests[1:]:
        assert not answer_of(request).has_error()
    assert requests[0].sender.final.wait(WAIT_SECONDS)
    wait_until(lambda: setup.unanswered == 0 and setup.running == 0)


def test_an_answer_that_cannot_be_sent_is_lost_alone(setup: Setup) -> None:
    lost = request_of(IMAGE=IMAGE, OPTIONS=SHORT)
    lost.sender.fails = True
    setup.model.execute([lost])
    neighbours = [setup.ask(), setup.ask(STREAM=True)]
    for neighbour in neighbours:
        assert not answer_of(neighbour).has_error()
    assert lost.sender.final.wait(WAIT_SECONDS)
    wait_until(lambda: setup.unanswered == 0)


def test_a_refusal_that_cannot_be_sent_costs_its_neighbours_no_caption(setup: Setup) -> None:
    lost = request_of(IMAGE=IMAGE, OPTIONS="[]")
    lost.sender.fails = True
    neighbour = request_of(IMAGE=IMAGE, OPTIONS=SHORT)
    setup.model.execute([lost, neighbour])
    assert not answer_of(neighbour).has_error()


def test_a_metric_that_raises_costs_nobody_a_caption(setup: Setup) -> None:
    MetricFamily.fails = True
    for request in [setup.ask() for _ in range(4)]:
        assert not answer_of(request).has_error()
    wait_until(lambda: any("metric" in line for line in Logger.lines))


def test_unloading_answers_everybody(model_repository: Repositories) -> None:
    setup = Setup(model_repository("projected"))
    long = json.dumps({"num_beams": 4, "max_length": 30, "min_length": 30})
    requests = [setup.ask(OPTIONS=long, STREAM=number % 2 == 0) for number in range(12)]
    setup.model.finalize()
    for request in requests:
        assert request.sender.final.is_set()
    assert setup.unanswered == 0


faults = st.lists(
    st.sampled_from(["fine", "parts", "encoder", "step", "sender", "image", "metric", "cancel"]),
    min_size=1,
    max_size=10,
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(kinds=faults)
def test_whatever_fails_everybody_is_answered_once_and_all_room_comes_back(
    setup: Setup, kinds: list[str]
) -> None:
    step_model = setup.model._engine._scheduler._step_model
    step = type(step_model).step
    failing = {"step": kinds.count("step")}

    def fails_at_first(batch: Any) -> Any:
        if failing["step"]:
            failing["step"] -= 1
            raise RuntimeError("the step fails")
        return step(step_model, batch)

    step_model.step = fails_at_first  # type: ignore[method-assign]  # For this test alone.
    setup.encoder_fails = kinds.count("encoder")
    MetricFamily.fails = "metric" in kinds
    requests = []
    for number, kind in enumerate(kinds):
        image = b"no image" if kind == "image" else IMAGE
        # Of every kind some have parts.
        parts: dict[str, Any] = {}
        if kind == "parts" or number % 3 == 0:
            parts["TILES"] = np.array([1, 3], np.int32)
        request = request_of(IMAGE=image, OPTIONS=SHORT, STREAM=number % 2 == 0, **parts)
        request.sender.fails = kind == "sender"
        request.sender.cancelled = kind == "cancel"
        requests.append(request)
        setup.model.execute([request])
    for request in requests:
        # The stand-in fails on a second final response.
        assert request.sender.final.wait(WAIT_SECONDS)
    wait_until(lambda: setup.unanswered == 0 and setup.running == 0)
    step_model.step = step.__get__(step_model)  # type: ignore[method-assign]  # As it was.
    setup.encoder_fails, MetricFamily.fails = 0, False
    assert not answer_of(setup.ask()).has_error()


def test_an_image_waits_for_memory_and_its_caller_is_let_go(setup: Setup) -> None:
    budget = setup.model._budget
    with budget.reserved(1 << 60):
        given_up, patient = setup.ask(), setup.ask()
        wait_until(lambda: budget.waiting == 2)
        given_up.sender.cancelled = True
        assert error_of(given_up).reason == "CANCELLED"
        assert not patient.sender.final.is_set()
    assert not answer_of(patient).has_error()
