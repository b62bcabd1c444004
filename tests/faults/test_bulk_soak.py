"""Bulk captioning that is killed again and again: in the end each image has its row, once.

The suite captions some hundred images; `make soak-bulk` 20,000 (--soak-bulk), and holds the memory
of the command and of the service at the end to what it was after a tenth of them.
"""

from __future__ import annotations

import json
import logging
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from captionserve_server.bench.processes import family_memory_mib
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.rows import COLUMNS
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO
from tests.faults.served import wait_until
from tests.pictures import numbered, pictures, png

logger = logging.getLogger(__name__)

KILLS = 5
# So many images are enough to see whether memory grows with them.
MANY = 20_000
MOST_GROWTH = 1.1
PICTURES = 24
BROKEN_EVERY = 100
# Of the other outputs, a tenth.
SMALLER = 10
# The last digits depend on what else was in the batch.
_ROUNDED = {"score", "confidence"}
COMMAND = (sys.executable, "-m", "captionserve_server.cli.main", "caption")


@pytest.fixture(scope="module")
def count(request: pytest.FixtureRequest) -> int:
    wanted: int = request.config.getoption("--soak-bulk")
    return wanted


def folder_of(count: int, folder: Path) -> Path:
    """So many images of which no two are the same, and a few that are none."""
    files = [png(picture) for picture in pictures(DEMO, PICTURES)]
    for number in range(count):
        path = folder / f"{number // 1000}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        broken = number % BROKEN_EVERY == BROKEN_EVERY // 2
        path.write_bytes(b"%d" % number if broken else numbered(files[number % PICTURES], number))
    return folder


def kept(journal: Path) -> int:
    """How many rows a journal has, as far as another process can see."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database,
    ):
        (found,) = database.execute("SELECT count(*) FROM rows").fetchone()
        return int(found)
    return 0


def killed_and_resumed(command: list[str], count: int, done: Callable[[], int]) -> None:
    """Run a command, kill it at random moments, and run it again until it ends by itself."""
    chance = random.Random(count)
    for moment in sorted(chance.sample(range(1, count), KILLS)):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(
            lambda moment=moment, process=process: done() >= moment or process.poll() is not None,  # type: ignore[misc]
            seconds=600.0,
        )
        process.kill()
        process.wait()
    assert subprocess.run(command, check=False, timeout=3600).returncode == 3


def memory_of(
    command: list[str], count: int, done: Callable[[], int], service: int
) -> list[tuple[float, float]]:
    """MiB of a command and of a service, after a tenth of the images and at last."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    seen = []
    for images in (count // 10, count - count // 100):
        wait_until(
            lambda images=images: done() >= images or process.poll() is not None,  # type: ignore[misc]
            seconds=3600.0,
        )
        seen.append((family_memory_mib(process.pid), family_memory_mib(service)))
    process.wait(timeout=3600)
    return seen


def broken(count: int) -> int:
    return len(range(BROKEN_EVERY // 2, count, BROKEN_EVERY))


def test_each_image_has_its_row_once(
    count: int, service: Callable[[str], ReadyReport], tmp_path: Path
) -> None:
    images = folder_of(count, tmp_path / "images")
    ready = service(DEMO)
    target = ("--target", ready.grpc)
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "killed.jsonl"
    after_a_tenth, at_the_end = memory_of(
        [*COMMAND, str(images), *target, "--output", str(undisturbed)],
        count,
        lambda: kept(Journal.of(undisturbed)),
        ready.pids["gateway"],
    )
    logger.info("MiB after a tenth: %s, at the end: %s", after_a_tenth, at_the_end)
    if count >= MANY:
        for before, after in zip(after_a_tenth, at_the_end, strict=True):
            assert after <= MOST_GROWTH * before
    killed_and_resumed(
        [*COMMAND, str(images), *target, "--output", str(output)],
        count,
        lambda: kept(Journal.of(output)),
    )
    truth, found = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (undisturbed, output)
    )
    assert len(found) == count
    assert [row["id"] for row in found] == [row["id"] for row in truth]
    assert len({row["id"] for row in found}) == count
    assert all(tuple(row) == COLUMNS for row in found)
    for row, right in zip(found, truth, strict=True):
        assert {name: value for name, value in row.items() if name not in _ROUNDED} == {
            name: value for name, value in right.items() if name not in _ROUNDED
        }
    failed = [row for row in found if row["error_code"]]
    assert len(failed) == broken(count)
    assert {row["error_reason"] for row in failed} == {"UNSUPPORTED_IMAGE_FORMAT"}
    assert {row["caption"] for row in failed} == {None}


def test_tables_and_sidecars_outlive_it_as_well(
    count: int, service: Callable[[str], ReadyReport], tmp_path: Path
) -> None:
    count = max(count // SMALLER, 3 * KILLS + BROKEN_EVERY)
    images = folder_of(count, tmp_path / "images")
    target = ("--target", service(DEMO).grpc)
    output = tmp_path / "killed.parquet"
    killed_and_resumed(
        [*COMMAND, str(images), *target, "--output", str(output), "--sidecar", "txt"],
        count,
        lambda: kept(Journal.of(output)),
    )
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(output).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == count
    for row in rows:
        sidecar = (images / row["id"]).with_suffix(".txt")
        if row["error_code"]:
            assert not sidecar.exists()
        else:
            assert sidecar.read_text() == row["caption"] + "\n"
            assert row["captions"] == [row["caption"]]
    assert not list(images.rglob(".*"))
