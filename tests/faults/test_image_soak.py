"""Damaged images by the hundreds: captioned or refused, in bounded time and memory.

Service and edge mode share `preprocess`; what they make of a file can differ only around it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve import CaptionClient, CaptionError
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.core.preprocessing import MAX_PIXELS
from captionserve_server.local import LocalCaptioner
from captionserve_server.serving.ready import ReadyReport
from PIL import Image

from tests.conftest import DEMO
from tests.soak_images import mutated_files

_RESULTS = {"captioned", "IMAGE_CORRUPT", "UNSUPPORTED_IMAGE_FORMAT", "IMAGE_TOO_MANY_PIXELS"}
# The interpreter with Pillow, numpy and the demo's art.
_INTERPRETER_BYTES = 250 << 20
_BYTES_PER_PIXEL = 8
# Of processor time: the largest picture that is accepted, on a slow core.
_SLOWEST_SECONDS = 20.0
_SEED = 14

_PEAK = """
import pathlib, resource, sys
from captionserve_server.core.preprocessing import PreprocessorConfig, preprocess
encoded = pathlib.Path(sys.argv[1]).read_bytes()
import PIL.Image, numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
preprocess(encoded, PreprocessorConfig())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_damaged_images_are_captioned_or_refused(request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--soak-images")
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak_images", str(count), str(_SEED)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert sum(report["outcomes"].values()) == count
    assert set(report["outcomes"]) <= _RESULTS
    assert report["slowest_seconds"] < _SLOWEST_SECONDS
    assert report["peak_bytes"] < _INTERPRETER_BYTES + _BYTES_PER_PIXEL * MAX_PIXELS


def large(kind: str, mode: str, **how: object) -> bytes:
    """A plain picture of 12 megapixels: a small file."""
    file = io.BytesIO()
    Image.new(mode, (4000, 3000)).save(file, kind, **how)
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    "made",
    [
        lambda: large("PNG", "I;16"),
        lambda: large("PNG", "RGBA"),
        lambda: large("PNG", "RGBA", exif=orientation(6)),
        lambda: large("PNG", "P", transparency=0),
        lambda: large("JPEG", "RGB", exif=orientation(6)),
        lambda: large("JPEG", "CMYK", exif=orientation(5)),
        lambda: large("GIF", "P"),
    ],
    ids=["16 bits", "RGBA", "RGBA turned", "palette", "JPEG turned", "CMYK turned", "GIF"],
)
def test_an_image_takes_at_most_eight_bytes_a_pixel(
    made: Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "large"
    path.write_bytes(made())
    command = [sys.executable, "-c", _PEAK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # What tiles, readers and the result take does not grow with the picture.
    assert int(done.stdout) < _BYTES_PER_PIXEL * 4000 * 3000 + (24 << 20)


def test_service_and_edge_mode_agree_on_damaged_images(
    service: Callable[[str], ReadyReport], model_repository: Callable[[str], Path]
) -> None:
    files = list(mutated_files(48, seed=_SEED))
    with (
        CaptionClient(service(DEMO).grpc) as client,
        LocalCaptioner(model_repository(DEMO), threads=1) as captioner,
    ):
        served = [_said(client, encoded) for encoded in files]
        local = [_said(captioner, encoded) for encoded in files]
    assert served == local
    refused = [each for each in local if each in _RESULTS]
    assert 0 < len(refused) < len(files)


def _said(captioner: CaptionClient | LocalCaptioner, encoded: bytes) -> str:
    """A caption, or the reason why there is none."""
    try:
        return captioner.caption(encoded).text
    except (CaptionServeError, CaptionError) as error:
        return str(error.reason)
