"""Putting a benchmark together when nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.bench.benchmark import Comparison, NothingToMeasureError, compare
from captionserve_server.bench.report import Settings

SETTINGS = Settings("captionserve bench", "tiny", 2, 1, 3, "transformers")


def comparison(checkpoint: str, repository: Path, pattern: str) -> Comparison:
    return Comparison(
        checkpoint=checkpoint,
        repositories={"int8": repository},
        precisions=(),
        num_beams=(1,),
        patterns=(pattern,),
        encode_batch=1,
        work_folder=repository,
    )


def test_rows_that_nobody_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasureError):
        compare(comparison("none", tmp_path, "captionserve fp32"), SETTINGS, lambda stage: None)


def test_a_system_that_does_not_start_is_in_the_report(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = str(checkpoint_folder("projected"))
    report = compare(comparison(checkpoint, tmp_path, "bare"), SETTINGS, lambda stage: None)
    assert report.summaries() == []
    assert set(report.measurements.failures) == {"bare graphs int8"}
    assert "ModelFolderError" in report.measurements.failures["bare graphs int8"]


def test_who_interrupts_keeps_what_has_been_measured(
    checkpoint_folder: Callable[[str], Path], model_repository: Callable[[str], Path]
) -> None:
    def interrupt(stage: str) -> None:
        if stage.startswith("round 2 of 2"):
            raise KeyboardInterrupt

    checkpoint = str(checkpoint_folder("projected"))
    asked = comparison(checkpoint, model_repository("projected"), "bare")
    report = compare(asked, SETTINGS, interrupt)
    (summary,) = report.summaries()
    assert summary.row.label == "bare graphs int8, 16 live, greedy"
    assert summary.tokens == 3
    assert report.measurements.failures == {"the rest": "interrupted"}
