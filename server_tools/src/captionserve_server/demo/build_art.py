"""Makes the art atlases of the demo scenes from the published npm packages of the emoji art.

Run once by hand, on the archives that `npm pack` writes; needs the `resvg-py` package:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
        @iconify-json/fluent-emoji-flat@1.2.6
    python -m captionserve_server.demo.build_art --archives .

Training and evaluation read only the committed atlases.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from captionserve_server.demo.kinds import all_code_points

TILE_SIZE_PIXELS = 72
COLUMNS = 10
ART_FOLDER = Path(__file__).parent / "art"


def _open_tile(png: bytes) -> Image.Image:
    """Return the art centred on a transparent square tile of the atlas' size."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    tile = Image.new("RGBA", (TILE_SIZE_PIXELS, TILE_SIZE_PIXELS))
    left, top = ((TILE_SIZE_PIXELS - side) // 2 for side in image.size)
    tile.paste(image, (left, top))
    return tile


def _read_member(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(member)
        if stream is None:
            raise FileNotFoundError(f"{member} is not a file in {archive.name}")
        return stream.read()


def _datasource_reader(archive: Path, vendor: str) -> Callable[[str], bytes]:
    """Reader of 64-pixel PNGs of the emoji-datasource packages, by code point."""
    with tarfile.open(archive) as tar:
        wanted = {f"package/img/{vendor}/64/{code}.png": code for code in all_code_points()}
        found = {
            wanted[member.name]: stream.read()
            for member in tar
            if member.name in wanted and (stream := tar.extractfile(member))
        }
    return found.__getitem__


def _iconify_reader(archive: Path) -> Callable[[str], bytes]:
    """Reader that draws the SVGs of an Iconify package as PNGs, by code point."""
    import resvg_py

    icons = json.loads(_read_member(archive, "package/icons.json"))
    names = json.loads(_read_member(archive, "package/chars.json"))
    side = icons["width"]

    def read(code: str) -> bytes:
        body = icons["icons"][names.get(code) or names[code.removesuffix("-fe0f")]]["body"]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {side} {side}" width="{side}" height="{side}">{body}</svg>'
        )
        size = TILE_SIZE_PIXELS
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))

    return read


def write_atlas(style: str, read_png: Callable[[str], bytes]) -> None:
    """Write one style's tiles, in the order of the index, as one palette-free PNG."""
    codes = all_code_points()
    rows = -(-len(codes) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * TILE_SIZE_PIXELS, rows * TILE_SIZE_PIXELS))
    for position, code in enumerate(codes):
        row, column = divmod(position, COLUMNS)
        corner = (column * TILE_SIZE_PIXELS, row * TILE_SIZE_PIXELS)
        atlas.paste(_open_tile(read_png(code)), corner)
    atlas.save(ART_FOLDER / f"{style}.png", optimize=True)


def write_index(styles: dict[str, str]) -> None:
    """Write the index that tells which tile shows which code point, and each style's package."""
    index = {
        "tile_size_pixels": TILE_SIZE_PIXELS,
        "columns": COLUMNS,
        "code_points": list(all_code_points()),
        "styles": styles,
    }
    (ART_FOLDER / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the three archives and write atlases and index."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archives", type=Path, required=True, help="folder of the npm archives")
    folder: Path = parser.parse_args().archives
    google = folder / "emoji-datasource-google-16.0.0.tgz"
    twitter = folder / "emoji-datasource-twitter-16.0.0.tgz"
    fluent = folder / "iconify-json-fluent-emoji-flat-1.2.6.tgz"
    write_atlas("noto", _datasource_reader(google, "google"))
    write_atlas("twemoji", _datasource_reader(twitter, "twitter"))
    write_atlas("fluent", _iconify_reader(fluent))
    write_index(
        {
            "noto": "emoji-datasource-google@16.0.0",
            "twemoji": "emoji-datasource-twitter@16.0.0",
            "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
        }
    )


if __name__ == "__main__":
    main()
