"""Runs with a captioner that is told what to do: each item has its row once, whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from captionserve import CaptionError, GenerationOptions
from captionserve_server.bulk.captioners import DifferentModelsError, common_model
from captionserve_server.bulk.journal import DifferentRunError, Journal
from captionserve_server.bulk.rows import Row
from captionserve_server.bulk.run import Progress, Run, still_to_do
from captionserve_server.bulk.sources import Item
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.bulk.fake_captioner import FakeCaptioner, StoppedError

OPTIONS = GenerationOptions()


def item(name: str, content: bytes | None = None) -> Item:
    def read() -> bytes:
        if name.startswith("missing"):
            raise FileNotFoundError(2, "No such file or directory")
        return name.encode() if content is None else content

    return Item(name, name, f"/{name}", read)


def run(
    journal: Journal, wanted: Iterable[Item], *captioners: FakeCaptioner, retry: bool = False
) -> Progress:
    progress = Progress()
    running = Run(
        journal,
        captioners,
        OPTIONS,
        "f" * 16,
        progress=progress,
        kept=lambda item, row: None,
        told=lambda progress: None,
    )
    running.caption(still_to_do(wanted, journal, progress, retry_failed=retry))
    return progress


def test_each_item_has_its_row(tmp_path: Path) -> None:
    names = ["a", "b", "bad c", "missing d", "e"]
    with Journal(tmp_path / "journal") as journal:
        progress = run(journal, map(item, names), FakeCaptioner())
        rows = {row.id: row for row in journal.rows()}
    assert sorted(rows) == sorted(names)
    assert (rows["a"].caption, rows["a"].error_code, rows["a"].source) == ("a", None, "/a")
    assert (rows["bad c"].caption, rows["bad c"].error_code) == (None, "NOT_SENT")
    assert rows["missing d"].error_message == "No such file or directory"
    assert (progress.captioned, dict(progress.failed)) == (3, {"UNREADABLE": 2})


def test_images_of_the_same_bytes_are_captioned_once(tmp_path: Path) -> None:
    captioner = FakeCaptioner()
    with Journal(tmp_path / "journal") as journal:
        wanted = [item(f"{n}", b"the same") for n in range(40)]
        progress = run(journal, wanted, captioner)
        later = run(journal, [*wanted, item("later", b"the same")], captioner)
        rows = list(journal.rows())
    assert captioner.seen == [b"the same"]
    assert {row.caption for row in rows} == {"the same"}
    assert len({row.id for row in rows}) == 41
    assert (progress.duplicates, later.duplicates, later.done_before) == (39, 1, 40)


def test_more_are_captioned_than_may_be_unkept_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        progress = run(journal, (item(f"{n:04}") for n in range(1500)), FakeCaptioner())
        assert (progress.captioned, len(journal)) == (1500, 1500)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "same", "bad", "missing"]), max_size=30),
    st.lists(st.integers(0, 8), max_size=4),
    st.integers(1, 3),
)
def test_whatever_ends_it_the_next_run_goes_on(
    kinds: list[str], stops: list[int], captioners: int
) -> None:
    wanted = [
        item(f"{kind} {n}", b"the same" if kind == "same" else None) for n, kind in enumerate(kinds)
    ]
    with Journal(None) as journal:
        for most in stops:
            with contextlib.suppress(StoppedError):
                run(journal, wanted, *(FakeCaptioner(most) for _ in range(captioners)))
            assert len(journal) <= len(wanted)
        run(journal, wanted, *(FakeCaptioner() for _ in range(captioners)))
        rows = list(journal.rows())
    assert sorted(row.id for row in rows) == sorted(each.id for each in wanted)
    for row in rows:
        right = {"good": row.id, "same": "the same"}.get(row.id.split()[0])
        assert row.caption == right
        assert row.failed == (right is None)


def test_what_failed_is_tried_again_when_asked_for(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        run(journal, [item("a", b"bad"), item("b")], FakeCaptioner())
        again = run(journal, [item("a"), item("b")], FakeCaptioner())
        assert (again.captioned, again.done_before) == (0, 2)
        again = run(journal, [item("a"), item("b")], FakeCaptioner(), retry=True)
        assert (again.captioned, again.done_before) == (1, 1)
        assert [row.caption for row in journal.rows()] == ["a", "b"]


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        journal.hold_to({"model": {"version": 1, "size": (2, 2)}, "options": {"num_beams": 4}})
        journal.hold_to({"model": {"version": 1, "size": [2, 2]}, "options": {"num_beams": 4}})
        with pytest.raises(DifferentRunError, match=r"model.version was 1, is 2; options.num_beam"):
            journal.hold_to({"model": {"version": 2, "size": (2, 2)}, "options": {}})


def test_services_that_share_the_work_serve_the_same() -> None:
    assert common_model([FakeCaptioner(), FakeCaptioner()])["version"] == 1
    with pytest.raises(DifferentModelsError, match="version"):
        common_model([FakeCaptioner(), FakeCaptioner(version=2)])


def test_an_error_of_a_service_is_told_as_it_was() -> None:
    import grpc

    error = CaptionError(grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_CORRUPT", "is cut off")
    row = Row("a", "/a").with_error(error)
    assert (row.error_code, row.error_reason, row.error_message) == (
        "INVALID_ARGUMENT",
        "IMAGE_CORRUPT",
        "is cut off",
    )
