"""What captioning a table costs beside captioning its images: in this process, and on Ray.

    python -m captionserve_server.bench.bulk_rates MODEL_REPOSITORY FILE.json

The engine alone (`caption_all`), `caption --local` and `bulk-ray --local` caption the same images,
in turns, on this machine with nothing else running. Commands do so with a table and with one that
is four times as long: the difference is their rate, and what is left of the short one their start.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from captionserve_server.bench.images import bench_images
from captionserve_server.local import LocalCaptioner

ROWS = 500
LONGER = 4
ROUNDS = 3
_ENGINE = "caption_all"
_COMMENT = b"\xff\xfe"


def measure(repository: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way to caption, by the number of images.

    Args:
        repository: a model repository.
        folder: for tables and what becomes of them.
    """
    images = different(bench_images(ROWS), ROWS * LONGER)
    tables = {count: _table(folder / f"{count}.parquet", images[:count]) for count in _counts()}
    found: dict[str, dict[str, list[float]]] = {}
    with LocalCaptioner(repository) as captioner:
        captioner.caption_all(images[:16])
    for _ in range(ROUNDS):
        with LocalCaptioner(repository) as captioner:
            begin = time.perf_counter()
            captioner.caption_all(images[:ROWS])
            _add(found, _ENGINE, ROWS, time.perf_counter() - begin)
        for name, command in commands(repository).items():
            for count, table in tables.items():
                with tempfile.TemporaryDirectory(dir=folder) as made:
                    seconds = _seconds([*command, str(table), "--output", f"{made}/out.parquet"])
                _add(found, name, count, seconds)
    return found


def commands(repository: Path) -> dict[str, list[str]]:
    """The commands, without table and output."""
    local = ("--local", str(repository))
    cores = len(os.sched_getaffinity(0))
    program = [sys.executable, "-m", "captionserve_server.cli.main"]
    on_ray = [*program, "bulk-ray", *local]
    return {
        "caption --local": [*program, "caption", *local],
        "bulk-ray, 1 actor": [*on_ray, "--actors", "1"],
        f"bulk-ray, {cores} actors": [*on_ray, "--actors", str(cores)],
    }


def figures(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Images a second while captioning, their share of the engine's, and seconds of a start."""
    engine = ROWS / statistics.median(seconds[_ENGINE][str(ROWS)])
    told = {_ENGINE: {"images_per_second": engine, "of_engine": 1.0, "start_seconds": 0.0}}
    for name, by_count in seconds.items():
        if name != _ENGINE:
            short, long = (statistics.median(by_count[str(count)]) for count in _counts())
            rate = (LONGER - 1) * ROWS / (long - short)
            told[name] = {
                "images_per_second": rate,
                "of_engine": rate / engine,
                "start_seconds": short - ROWS / rate,
            }
    return told


def different(files: Sequence[bytes], count: int) -> list[bytes]:
    """So many JPEG files of which no two are the same: those that are given, with comments."""
    made = []
    for number in range(count):
        file, comment = files[number % len(files)], b"%08d" % number
        segment = _COMMENT + (len(comment) + 2).to_bytes(2, "big") + comment
        made.append(file[:2] + segment + file[2:])
    return made


def _counts() -> tuple[int, int]:
    return ROWS, ROWS * LONGER


def _add(found: dict[str, dict[str, list[float]]], name: str, count: int, seconds: float) -> None:
    # As JSON has keys.
    found.setdefault(name, {}).setdefault(str(count), []).append(seconds)


def _table(path: Path, images: Sequence[bytes]) -> Path:
    from pyarrow import parquet, table

    parquet.write_table(table({"image": images}), path, row_group_size=100)
    return path


def _seconds(command: Sequence[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print a table, and write all to a file."""
    repository, file = Path(sys.argv[1]).absolute(), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(repository, Path(folder))
    told = figures(seconds)
    for name, each in told.items():
        sys.stdout.write(
            f"{name:20} {each['images_per_second']:6.1f} images/s"
            f" {each['of_engine']:6.1%} of the engine's, {each['start_seconds']:5.1f} s to start\n"
        )
    command = "python -m captionserve_server.bench.bulk_rates MODEL_REPOSITORY FILE"
    report = {"command": command, "figures": told, "seconds": seconds}
    file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
