"""The pictures of docs/playground.md are of the page as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.page.conftest import PHONE, Visitor

MOST_BYTES = 200_000


def taken(visitor: Visitor, folder: Path, name: str) -> None:
    """A picture of what is seen, in few colours."""
    path = folder / f"{name}.png"
    visitor.page.wait_for_timeout(300)
    visitor.page.screenshot(path=path)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(192, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    assert path.stat().st_size < MOST_BYTES


def test_pictures_for_the_documentation(
    visit: Callable[..., Visitor], pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    folder: Path = pytestconfig.getoption("--pictures") or tmp_path
    folder.mkdir(exist_ok=True)
    wide = {"width": 1200, "height": 820}
    light = visit(wide, color_scheme="light", reduced_motion="reduce")
    light.take_sample("penguin")
    light.page.locator(".word", has_text="penguin").click()
    taken(light, folder, "playground")
    dark = visit(wide, color_scheme="dark", reduced_motion="reduce")
    dark.take_sample("crown")
    dark.page.locator("#beams").scroll_into_view_if_needed()
    dark.page.locator("#timing").scroll_into_view_if_needed()
    taken(dark, folder, "playground-search")
    phone = visit(PHONE, color_scheme="light", reduced_motion="reduce", device_scale_factor=2)
    phone.take_sample("sunflower")
    phone.page.locator("#answer").scroll_into_view_if_needed()
    taken(phone, folder, "playground-phone")
