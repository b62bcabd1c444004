"""Putting a benchmark together when nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.bench.benchmark import Comparison, NothingToMeasureError, compare
from captionserve_server.bench.report import Settings

SETTINGS = Settings("captionserve bench", "tiny", 1, 1, None, "transformers")


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
