"""`captionserve bulk-ray`: each row has its caption once, whoever is killed meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from captionserve_server.bulk.rows import COLUMNS
from captionserve_server.local import LocalCaptioner
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO
from tests.faults.served import wait_until
from tests.pictures import numbered, pictures, png
from tests.ray.conftest import Ray

PICTURES = 8
# Bytes as others know them: Hugging Face keeps images as structs.
KINDS = ("bytes", "struct", "path")
SOME_FAILED = 3
BATCH = 20


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [png(picture) for picture in pictures(DEMO, PICTURES)]


@pytest.fixture(scope="module")
def truth(files: list[bytes], model_repository: Callable[[str], Path]) -> list[str]:
    """The captions of the files."""
    with LocalCaptioner(model_repository(DEMO)) as captioner:
        return [result.text for result in captioner.caption_all(files)]


@pytest.fixture
def local(model_repository: Callable[[str], Path]) -> tuple[str, ...]:
    """Two actors that have a model each."""
    return ("--local", str(model_repository(DEMO)), "--actors", "2", "--batch-size", str(BATCH))


def table(folder: Path, name: str, files: list[bytes], rows: range, kind: str = "bytes") -> Path:
    """A table of images of which no two are the same; the last of each 25 is none."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for row in rows:
        broken = row % 25 == 24
        image = b"%d" % row if broken else numbered(files[row % len(files)], row)
        if kind == "path":
            (folder / f"{row}.png").write_bytes(image)
        values = {"bytes": image, "struct": {"bytes": image, "path": "x"}, "path": f"{row}.png"}
        column = "path" if kind == "path" else "image"
        written.append({"id": f"row {row}", column: values[kind], "licence": "CC0"})
    path = folder / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), path, row_group_size=15)
    return path


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows as whoever reads the folder as one table sees them."""
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(output).to_pylist()
    return found


def assert_each_has_its_row(output: Path, count: int, truth: list[str]) -> None:
    found = {row["id"]: row for row in rows_of(output)}
    assert len(found) == len(rows_of(output)) == count
    for number in range(count):
        row = found[f"row {number}"]
        if number % 25 == 24:
            assert row["error_reason"] == "UNSUPPORTED_IMAGE_FORMAT"
            assert row["caption"] is None
            assert row["source"]
        else:
            assert row["caption"] == truth[number % len(truth)]
            assert row["error_code"] is None
    assert not list(output.glob(".*"))


def parts(output: Path) -> list[str]:
    return sorted(part.name for part in output.glob("part-*.parquet"))


def attempts(output: Path) -> list[Path]:
    return list((output / ".attempts").glob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_become_a_table_of_captions(
    kind: str,
    ray: Ray,
    files: list[bytes],
    truth: list[str],
    local: tuple[str, ...],
    tmp_path: Path,
) -> None:
    table(tmp_path / "in", "first", files, range(45), kind)
    table(tmp_path / "in" / "below", "second", files, range(45, 70), kind)
    status, said = ray.run(tmp_path / "in", "--output", tmp_path / "out", *local, "--json")
    assert status == SOME_FAILED, said
    assert_each_has_its_row(tmp_path / "out", 70, truth)
    assert len(parts(tmp_path / "out")) == 5
    assert tuple(rows_of(tmp_path / "out")[0]) == COLUMNS
    *_, before, done = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    failed = {"UNSUPPORTED_IMAGE_FORMAT": 2}
    assert before | {"total": 70, "seen": 70, "captioned": 68, "failed": failed} == before
    assert done == {
        **{"event": "done", "captioned": 68, "duplicates": 0, "done_before": 0, "failed": failed}
    }


def test_a_service_captions_as_well(
    ray: Ray,
    files: list[bytes],
    truth: list[str],
    service: Callable[[str], ReadyReport],
    tmp_path: Path,
) -> None:
    path = table(tmp_path, "in", files, range(60))
    token = tmp_path / "token"
    token.write_text("nobody asks for it\n")
    status, said = ray.run(
        *(path, "--output", tmp_path / "out", "--target", service(DEMO).grpc),
        *("--actors", "2", "--batch-size", "10", "--token-file", token),
    )
    assert status == SOME_FAILED, said
    assert_each_has_its_row(tmp_path / "out", 60, truth)


def test_a_killed_actor_costs_no_row(
    ray: Ray, files: list[bytes], truth: list[str], local: tuple[str, ...], tmp_path: Path
) -> None:
    count, output = 400, tmp_path / "out"
    table(tmp_path, "in", files, range(count))
    process = ray.start(tmp_path / "in.parquet", "--output", output, *local)
    for _ in range(2):
        # Each actor has two batches under way.
        wait_until(lambda: len(ray.actors()) == 2 and len(attempts(output)) >= 4)
        done, victim = len(parts(output)), random.choice(ray.actors())
        victim.kill()
        wait_until(lambda: len(parts(output)) >= done + 5 or process.poll() is not None)  # noqa: B023
        # What it had not finished is left, until all is done.
        assert victim.pid not in {each.pid for each in ray.actors()}
    said, _ = process.communicate(timeout=300)
    assert process.returncode == SOME_FAILED, said
    assert_each_has_its_row(output, count, truth)


def test_a_killed_command_goes_on_without_reading_what_is_done(
    ray: Ray, files: list[bytes], truth: list[str], local: tuple[str, ...], tmp_path: Path
) -> None:
    count, output = 200, tmp_path / "out"
    path = table(tmp_path, "in", files, range(count), "path")
    cluster = set(ray.processes())
    process = ray.start(path, "--output", output, *local, address=None)
    wait_until(lambda: len(parts(output)) >= 3)
    process.kill()
    process.communicate()
    # It takes its own Ray with it.
    wait_until(lambda: set(ray.processes()) <= cluster)
    done = {row["id"] for row in rows_of(output)}
    assert 3 * BATCH <= len(done) < count
    kept = {name: (output / name).stat().st_mtime_ns for name in parts(output)}
    for number in range(count):
        if f"row {number}" in done:
            (tmp_path / f"{number}.png").unlink()
    status, said = ray.run(path, "--output", output, *local)
    assert status == SOME_FAILED, said
    assert_each_has_its_row(output, count, truth)
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept


def test_what_failed_is_tried_again_when_asked_for(
    ray: Ray, files: list[bytes], truth: list[str], local: tuple[str, ...], tmp_path: Path
) -> None:
    path, output = table(tmp_path, "in", files, range(60), "path"), tmp_path / "out"
    missing = [tmp_path / f"{number}.png" for number in (3, 5)]
    contents = [each.read_bytes() for each in missing]
    for each in missing:
        each.unlink()
    assert ray.run(path, "--output", output, *local)[0] == SOME_FAILED
    reasons = [row["error_reason"] for row in rows_of(output) if row["error_code"]]
    assert sorted(reasons) == ["UNREADABLE"] * 2 + ["UNSUPPORTED_IMAGE_FORMAT"] * 2
    for each, content in zip(missing, contents, strict=True):
        each.write_bytes(content)
    # All others are not read again.
    for number in range(60):
        if number not in (3, 5, 24, 49):
            (tmp_path / f"{number}.png").unlink()
    assert ray.run(path, "--output", output, *local)[0] == SOME_FAILED
    assert [row["error_reason"] for row in rows_of(output)].count("UNREADABLE") == 2
    status, said = ray.run(path, "--output", output, *local, "--retry-failed", "--json")
    assert status == SOME_FAILED
    assert json.loads(said.splitlines()[-1])["captioned"] == 2
    assert_each_has_its_row(output, 60, truth)


def test_what_was_made_otherwise_is_refused(
    ray: Ray, files: list[bytes], truth: list[str], local: tuple[str, ...], tmp_path: Path
) -> None:
    path, output = table(tmp_path, "in", files, range(30)), tmp_path / "out"
    assert ray.run(path, "--output", output, *local)[0] == SOME_FAILED
    made = parts(output)
    table(tmp_path, "in", files, range(31))
    other = ("--num-beams", "2", "--batch-size", "7")
    status, said = ray.run(path, "--output", output, *local, *other)
    assert (status, parts(output)) == (2, made), said
    for told in (
        "options.num_beams was None, is 2",
        f"bulk-ray.batch_size was {BATCH}, is 7",
        "in.parquet.rows was 30, is 31",
    ):
        assert told in said
    status, said = ray.run(path, "--output", output, *local, *other, "--restart")
    assert status == SOME_FAILED, said
    assert len(rows_of(output)) == 31


def test_what_stands_in_the_way_is_one_sentence(
    ray: Ray, files: list[bytes], local: tuple[str, ...], tmp_path: Path
) -> None:
    path = table(tmp_path, "in", files, range(30))
    nobody = ("--target", "127.0.0.1:1", "--timeout", "1")
    for flags, status, told in (
        ((*local, "--num-beams", "99"), 5, "num_beams"),
        (nobody, 5, "nobody listens"),
    ):
        found, said = ray.run(path, "--output", tmp_path / "out", *flags)
        assert (found, "Traceback" in said) == (status, False), said
        assert told in said
    found, said = ray.run(path, "--output", tmp_path / "out", *local, address="127.0.0.1:1")
    assert found == 1, said
    assert "no Ray cluster can be reached at 127.0.0.1:1" in said


def test_a_batch_that_ends_every_actor_ends_the_run(
    ray: Ray, files: list[bytes], local: tuple[str, ...], tmp_path: Path
) -> None:
    path, output = table(tmp_path, "in", files, range(BATCH)), tmp_path / "out"
    process = ray.start(path, "--output", output, *local)
    killed: set[int] = set()
    while process.poll() is None:
        for actor in ray.actors():
            if len(attempts(output)) > len(killed) and actor.pid not in killed:
                actor.kill()
                killed.add(actor.pid)
    said, _ = process.communicate()
    assert (process.returncode, parts(output)) == (1, []), said
    assert len(killed) == 3
    assert f"rows 0 to {BATCH - 1} of {path}" in said
