"""`captionserve caption` for many, with a captioner that is told what to do."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from captionserve import GenerationOptions
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.rows import COLUMNS
from captionserve_server.bulk.sources import count
from captionserve_server.cli.bulk import BulkOptions, caption_many
from captionserve_server.cli.console import ExitCode
from captionserve_server.core.framing import Resize
from pyarrow import parquet

from tests.unit.bulk.fake_captioner import FakeCaptioner, StoppedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_text(name)
    return tmp_path / "images"


def wanted(output: Path | None, alt_text_chars: int | None = None, **more: bool) -> BulkOptions:
    flags = ("sidecar", "overwrite", "only_missing", "retry_failed", "restart", "dry_run")
    given = {flag: more.get(flag, False) for flag in flags}
    return BulkOptions(output=output, limit=None, alt_text_chars=alt_text_chars, **given)


def run(
    folder: Path,
    options: BulkOptions,
    captioner: FakeCaptioner | None = None,
    resize: Resize | None = None,
) -> ExitCode:
    captioners = [captioner or FakeCaptioner()]
    return caption_many(
        [str(folder)], captioners, GenerationOptions(), options, resize=resize, as_json=True
    )


def captions(output: Path) -> list[str]:
    return [json.loads(line)["caption"] for line in output.read_text().splitlines()]


def fingerprints(output: Path) -> set[str]:
    return {json.loads(line)["options_fingerprint"] for line in output.read_text().splitlines()}


def test_an_output_of_unknown_making_is_replaced_only_when_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("somebody's\n")
    with pytest.raises(typer.BadParameter, match="--restart"):
        run(folder, wanted(output))
    assert output.read_text() == "somebody's\n"
    run(folder, wanted(output, restart=True, dry_run=True))
    assert output.read_text() == "somebody's\n"
    assert run(folder, wanted(output, restart=True)) is ExitCode.OK
    assert captions(output) == ["a", "b"]


def test_another_way_of_resizing_is_another_run(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(folder, wanted(output))
    plain = fingerprints(output)
    # The checkpoint's way may be said or not.
    assert run(folder, wanted(output), resize="checkpoint") is ExitCode.OK
    assert fingerprints(output) == plain
    with pytest.raises(typer.BadParameter, match="resize"):
        run(folder, wanted(output), resize="letterbox")
    run(folder, wanted(output, restart=True), resize="letterbox")
    assert fingerprints(output).isdisjoint(plain)


def test_to_begin_anew_forgets_what_was_done(folder: Path, tmp_path: Path) -> None:
    output, again = tmp_path / "out.jsonl", FakeCaptioner()
    run(folder, wanted(output))
    run(folder, wanted(output), again)
    assert again.seen == []
    run(folder, wanted(output, restart=True), again)
    assert sorted(again.seen) == [b"a", b"b"]


def test_a_sidecar_without_its_row_does_not_hide_the_image(folder: Path, tmp_path: Path) -> None:
    # As after a death between the two.
    (folder / "a.txt").write_text("a\n")
    (folder / ".b.txt.partial").write_text("cut o")
    output = tmp_path / "out.jsonl"
    assert run(folder, wanted(output, sidecar=True)) is ExitCode.OK
    assert captions(output) == ["a", "b"]
    assert (folder / "b.txt").read_text() == "b\n"
    assert list(folder.glob(".*")) == []


def test_sidecars_alone_are_left_or_written_anew(folder: Path) -> None:
    (folder / "a.txt").write_text("mine\n")
    captioner = FakeCaptioner()
    run(folder, wanted(None, sidecar=True), captioner)
    assert captioner.seen == [b"b"]
    assert (folder / "a.txt").read_text() == "mine\n"
    run(folder, wanted(None, sidecar=True, overwrite=True))
    assert (folder / "a.txt").read_text() == "a\n"


def test_a_captioner_that_fails_leaves_what_is_done(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(StoppedError):
        run(folder, wanted(output), FakeCaptioner(most=1))
    assert not output.exists()
    assert Journal.of(output).exists()
    rest = FakeCaptioner()
    run(folder, wanted(output), rest)
    assert len(rest.seen) == 1
    assert captions(output) == ["a", "b"]


def test_what_has_images_in_it_is_not_read_to_be_counted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"")
    (tmp_path / "table.parquet").write_bytes(b"")
    assert count([str(folder), str(folder / "a.png")]) == 3
    for source in ("shard.tar", "table.parquet", "*.tar"):
        assert count([str(folder), str(tmp_path / source)]) is None
    assert count(["-"]) is None


def rows(output: Path) -> list[dict[str, Any]]:
    if output.suffix == ".parquet":
        found: list[dict[str, Any]] = parquet.read_table(output).to_pylist()
        return found
    with output.open(encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_alt_text_has_columns_of_its_own_also_of_rows_that_are_there(
    suffix: str, tmp_path: Path
) -> None:
    for name, content in {"dog": "a photo of a brown dog and a", "no": "bad"}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_text(content)
    output = tmp_path / f"out{suffix}"
    run(tmp_path / "images", wanted(output))
    assert [list(row) for row in rows(output)] == [list(COLUMNS)] * 2
    again = FakeCaptioner()
    run(tmp_path / "images", wanted(output, 40), again)
    assert again.seen == []
    dog, bad = rows(output)
    assert list(dog) == list(bad) == [*COLUMNS, "alt_text", "alt_text_warnings"]
    assert dog["caption"] == "a photo of a brown dog and a"
    assert dog["alt_text"] == "A brown dog"
    warnings = dog["alt_text_warnings"]
    assert (json.loads(warnings) if suffix == ".csv" else warnings) == ["unfinished"]
    assert not bad["alt_text"]
    assert not bad["alt_text_warnings"]


def test_an_images_own_name_as_its_alt_text_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "brown-dog.png").write_text("brown dog")
    output = tmp_path / "out.jsonl"
    run(tmp_path / "images", wanted(output, 125))
    assert rows(output)[0]["alt_text_warnings"] == ["file_name"]


def test_sidecars_of_one_output_have_either_captions_or_alt_texts(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "a.png").write_text("an image of a brown dog")
    output = tmp_path / "out.jsonl"
    run(folder, wanted(output, 125, sidecar=True))
    assert (folder / "a.txt").read_text() == "A brown dog\n"
    assert captions(output)[0] == "an image of a brown dog"
    (folder / "c.png").write_text("c")
    for chars in (None, 40):
        with pytest.raises(typer.BadParameter, match="alt_text_chars was 125"):
            run(folder, wanted(output, chars, sidecar=True))
    assert run(folder, wanted(output, 125, sidecar=True)) is ExitCode.OK
    assert (folder / "c.txt").read_text() == "C\n"
