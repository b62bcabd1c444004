"""Parts of an image, and ways of resizing it, through the whole stack, in each way of asking."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    CaptionResult,
    GenerationOptions,
)
from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.export.repository import export_checkpoint
from captionserve_server.local import LocalCaptioner
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from PIL import Image, ImageOps

from tests.conftest import DEMO, DEMO_FOLDER
from tests.congruence.test_preprocessing import encoded
from tests.e2e.test_cli import run
from tests.pictures import png

TIMEOUT_SECONDS = 120.0
BEAMS = GenerationOptions(num_beams=4)
TILES = (2, 2)
BOX = (224, 0, 448, 224)

Service = Callable[[str], ReadyReport]


@pytest.fixture(scope="module")
def collage() -> Image.Image:
    """Four scenes side by side, each of the size that the model reads."""
    scenes = held_out_scenes("unseen_combinations", 4, seed=21)
    picture = Image.new("RGB", (448, 448))
    for number, scene in enumerate(scenes):
        corner = (number % 2 * 224, number // 2 * 224)
        picture.paste(scene.image.convert("RGB").resize((224, 224)), corner)
    return picture


@pytest.fixture
def client(service: Service) -> Iterator[CaptionClient]:
    with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as made:
        yield made


def tokens(described: Any) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in described.captions]


def all_tokens(result: Any) -> list[list[tuple[int, ...]]]:
    """Of the whole, then of each part."""
    return [tokens(result), *map(tokens, result.regions)]


def test_each_part_is_captioned_as_a_file_of_its_pixels(
    client: CaptionClient, collage: Image.Image
) -> None:
    options = GenerationOptions(num_beams=4, num_return_sequences=2, output_attentions=True)
    result = client.caption(png(collage), options, regions=[BOX, (3, 5, 400, 300)], tiles=TILES)
    boxes = [region.box for region in result.regions]
    assert boxes[:2] == [BOX, (3, 5, 400, 300)]
    assert boxes[2:] == [(0, 0, 224, 224), BOX, (0, 224, 224, 448), (224, 224, 448, 448)]
    alone = [client.caption(png(collage.crop(box)), options) for box in boxes]
    whole = client.caption(png(collage), options)
    assert all_tokens(result) == list(map(tokens, [whole, *alone]))
    for region, own in zip(result.regions, alone, strict=True):
        for found, expected in zip(region.captions, own.captions, strict=True):
            assert found.text == expected.text
            assert found.score == pytest.approx(expected.score, abs=1e-4)
            assert found.attention is not None
            assert expected.attention is not None
            np.testing.assert_allclose(found.attention.values, expected.attention.values, atol=1e-4)
    # Four scenes say more than one sentence of them all.
    assert len({region.text for region in result.regions[2:]}) == 4


def test_a_photo_on_its_side_is_cut_upright(client: CaptionClient, collage: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(collage, "JPEG", quality=70, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    result = client.caption(content, BEAMS, regions=[(10, 200, 448, 448)], resize="letterbox")
    cut = client.caption(png(upright.crop((10, 200, 448, 448))), BEAMS, resize="letterbox")
    assert tokens(result.regions[0]) == tokens(cut)


def test_every_way_of_asking_says_the_same(
    service: Service,
    client: CaptionClient,
    collage: Image.Image,
    model_repository: Callable[[str], Path],
) -> None:
    content = png(collage)
    asked: Any = {"regions": [BOX], "tiles": TILES, "resize": "center_crop"}
    expected = all_tokens(client.caption(content, BEAMS, **asked))
    assert len(expected) == 6

    *words, last = client.caption_stream(content, BEAMS, **asked)
    assert last.result is not None
    assert all_tokens(last.result) == expected
    assert "".join(update.text for update in words) == last.result.text

    for outcome in client.caption_many([content] * 3, BEAMS, bypass_cache=True, **asked):
        assert outcome.result is not None
        assert all_tokens(outcome.result) == expected

    async def awaited() -> list[CaptionResult]:
        async with AsyncCaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as other:
            one = await other.caption(content, BEAMS, bypass_cache=True, **asked)
            many = [each.result async for each in other.caption_many([content], BEAMS, **asked)]
            words = other.caption_stream(content, BEAMS, **asked)
            stream = [update.result async for update in words]
            return [each for each in (one, many[0], stream[-1]) if each is not None]

    assert [all_tokens(each) for each in asyncio.run(awaited())] == [expected] * 3

    with LocalCaptioner(model_repository(DEMO)) as captioner:
        assert all_tokens(captioner.caption(content, BEAMS, **asked)) == expected


def test_questions_with_parts_are_answered_beside_others(
    client: CaptionClient, collage: Image.Image
) -> None:
    content = png(collage)
    expected = all_tokens(client.caption(content, BEAMS, tiles=(4, 4)))
    single = tokens(client.caption(content, BEAMS))
    with ThreadPoolExecutor(16) as pool:
        large = [
            pool.submit(client.caption, content, BEAMS, tiles=(4, 4), bypass_cache=True)
            for _ in range(6)
        ]
        small = [pool.submit(client.caption, content, BEAMS, bypass_cache=True) for _ in range(10)]
        assert [all_tokens(each.result()) for each in large] == [expected] * 6
        assert [tokens(each.result()) for each in small] == [single] * 10
    assert client.models().working == client.models().waiting == 0


def test_other_boxes_are_another_question(client: CaptionClient, collage: Image.Image) -> None:
    content = png(collage.rotate(3))
    first = client.caption(content, regions=[BOX])
    again = client.caption(content, regions=[BOX])
    other = client.caption(content, regions=[(0, 0, 224, 224)])
    plain = client.caption(content, resize="checkpoint")
    letterbox = client.caption(content, resize="letterbox")
    assert [each.cached for each in (first, again, other, plain, letterbox)] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert again.regions == first.regions
    assert client.caption(content).cached


@pytest.mark.parametrize(
    ("framing", "fields"),
    [
        # By the gateway, and by the decoder once it knows the image's size.
        ({"regions": [BOX, (5, 5, 5, 9)]}, {"regions[1]"}),
        ({"regions": [BOX, (0, 0, 449, 9), (0, 0, 9, 449)]}, {"regions[1]", "regions[2]"}),
        ({"tiles": (5, 5)}, {"tiles"}),
        ({"tiles": (0, 1)}, {"tiles"}),
    ],
)
def test_what_an_image_does_not_have_is_refused_by_field(
    framing: Any, fields: set[str], client: CaptionClient, collage: Image.Image
) -> None:
    def asked_once() -> None:
        client.caption(png(collage), BEAMS, **framing)

    def asked_for_words() -> None:
        list(client.caption_stream(png(collage), BEAMS, **framing))

    for asked in (asked_once, asked_for_words):
        with pytest.raises(CaptionError) as refused:
            asked()
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.reason == "INVALID_FRAMING"
        assert set(refused.value.field_violations) == fields
    (outcome,) = client.caption_many([png(collage)], BEAMS, **framing)
    assert isinstance(outcome.error, CaptionError)
    assert set(outcome.error.field_violations) == fields


def test_a_tensor_has_no_parts(client: CaptionClient) -> None:
    with pytest.raises(CaptionError) as refused:
        client.caption(np.ones((3, 224, 224), np.float32), tiles=(1, 2), resize="letterbox")
    assert set(refused.value.field_violations) == {"tiles", "resize"}


def test_kserve_callers_ask_by_tensors(
    service: Service, client: CaptionClient, collage: Image.Image
) -> None:
    content = png(collage)
    expected = client.caption(content, BEAMS, regions=[BOX], tiles=(1, 2), resize="letterbox")
    values = {
        wire.IMAGE: np.array([content], np.object_),
        wire.OPTIONS: np.array([b'{"num_beams": 4}'], np.object_),
        wire.REGIONS: np.array([BOX], np.int32),
        wire.TILES: np.array([1, 2], np.int32),
        wire.RESIZE: np.array([b"letterbox"], np.object_),
    }
    inputs = []
    for spec, value in values.items():
        kind = {"TYPE_STRING": "BYTES", "TYPE_INT32": "INT32"}[spec.data_type]
        inputs.append(tritonclient.grpc.InferInput(spec.name, list(value.shape), kind))
        inputs[-1].set_data_from_numpy(value)
    triton = tritonclient.grpc.InferenceServerClient(service(DEMO).triton_grpc)
    answer = triton.infer(wire.CAPTIONER.name, inputs)
    texts = [text.decode() for text in answer.as_numpy(wire.TEXT.name)]
    assert texts == [expected.text, *(region.text for region in expected.regions)]
    assert answer.as_numpy(wire.REGION_BOXES.name).tolist() == [
        list(region.box) for region in expected.regions
    ]
    assert answer.as_numpy(wire.REGION_CAPTIONS.name).tolist() == [1, 1, 1]


def test_the_command_line_asks_for_parts(
    service: Service,
    client: CaptionClient,
    collage: Image.Image,
    model_repository: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "collage.png"
    collage.save(path)
    expected = client.caption(path, regions=[BOX], tiles=(1, 2), resize="letterbox")
    flags = ("--region", "224,0,448,224", "--tiles", "1x2", "--resize", "letterbox")
    target = ("--target", service(DEMO).grpc)
    here = ("--local", str(model_repository(DEMO)))
    for where in (target, here):
        process = run("caption", str(path), *flags, "--json", *where)
        assert process.returncode == 0, process.stderr
        (answer,) = json.loads(process.stdout)
        assert answer["captions"][0]["text"] == expected.text
        found = [(tuple(each["box"]), each["captions"][0]["text"]) for each in answer["regions"]]
        assert found == [(region.box, region.text) for region in expected.regions]
    for extra in (target, ("--stream", *target), ("--stream", *here)):
        lines = run("caption", str(path), *flags, *extra).stdout.splitlines()
        assert lines[0].startswith(f"{path}: {expected.text}")
        assert [line.rsplit(" (", 1)[0] for line in lines[1:]] == [
            f"{path} [{','.join(map(str, region.box))}]: {region.text}"
            for region in expected.regions
        ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--region", "1,2,3"), "LEFT,TOP,RIGHT,BOTTOM"),
        (("--tiles", "2,2"), "ROWSxCOLUMNS"),
        (("--resize", "squash"), "letterbox"),
        (("--tiles", "2x2", "--output", "out.jsonl"), "single images"),
        (("--region", "0,0,9,9", "--sidecar", "txt"), "single images"),
    ],
)
def test_flags_that_mean_nothing_are_wrong_usage(flags: tuple[str, ...], said: str) -> None:
    process = run("caption", "photo.jpg", *flags)
    assert process.returncode == 2
    assert said in process.stderr


def test_many_images_are_resized_alike(
    service: Service,
    client: CaptionClient,
    model_repository: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("penguin.jpg", "crown.png"):
        with Image.open(DEMO_FOLDER / "images" / name) as image:
            wide = Image.new("RGB", (image.width * 2, image.height), (200, 180, 90))
            wide.paste(image.convert("RGB"))
            wide.save(folder / f"{Path(name).stem}.png")
    expected = {
        path.name: client.caption(path, resize="letterbox").text for path in folder.iterdir()
    }
    fingerprints = set()
    wheres = (("--target", service(DEMO).grpc), ("--local", str(model_repository(DEMO))))
    for number, where in enumerate(wheres):
        output = tmp_path / f"{number}.jsonl"
        command = ("caption", str(folder), "--output", str(output), *where)
        process = run(*command, "--resize", "letterbox")
        assert process.returncode == 0, process.stderr
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert {row["id"]: row["caption"] for row in rows} == expected
        fingerprints |= {row["options_fingerprint"] for row in rows}
        # Without it is another run.
        assert run(*command).returncode == 2
    assert len(fingerprints) == 1


def test_another_image_size_is_served_as_it_is_captioned_in_one_process(
    collage: Image.Image, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    export_checkpoint(str(DEMO_FOLDER / "checkpoint"), repository, image_size=280)
    with (
        launched_service(repository) as report,
        CaptionClient(report.grpc, timeout=TIMEOUT_SECONDS) as client,
        LocalCaptioner(repository) as captioner,
    ):
        (model,) = client.models().models
        assert model.image_size == (280, 280)
        options = GenerationOptions(num_beams=4, output_attentions=True)
        served = client.caption(png(collage), options, tiles=TILES)
        local = captioner.caption(png(collage), options, tiles=TILES)
        assert all_tokens(served) == all_tokens(local)
        attention = served.captions[0].attention
        expected = local.captions[0].attention
        assert attention is not None
        assert expected is not None
        assert (attention.rows, attention.cols) == expected.shape[1:] == (5, 5)
