"""Putting a benchmark together when nothing can be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.bench.benchmark import NothingToMeasureError, compare
from captionserve_server.bench.report import Comparison
from captionserve_server.export.precision import Precision


def comparison(checkpoint: Path, repository: Path, pattern: str) -> Comparison:
    return Comparison(
        command="captionserve bench",
        checkpoint=str(checkpoint),
        repositories={Precision.INT8: repository},
        patterns=(pattern,),
        references=("bare",),
        num_beams=(1,),
        rounds=2,
        images=1,
        forced_tokens=3,
    )


def test_rows_that_nobody_has_are_refused(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = comparison(checkpoint_folder("projected"), tmp_path, "captionserve fp32")
    with pytest.raises(NothingToMeasureError):
        compare(asked, lambda stage: None)


def test_a_system_that_does_not_start_is_in_the_report(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = comparison(checkpoint_folder("projected"), tmp_path, "bare")
    report = compare(asked, lambda stage: None)
    assert report.summaries() == []
    assert set(report.failures) == {"bare graphs int8"}
    assert "ModelFolderError" in report.failures["bare graphs int8"]


def test_who_interrupts_keeps_what_has_been_measured(
    checkpoint_folder: Callable[[str], Path], model_repository: Callable[[str], Path]
) -> None:
    def interrupt(stage: str) -> None:
        if stage.startswith("round 2 of 2"):
            raise KeyboardInterrupt

    asked = comparison(checkpoint_folder("projected"), model_repository("projected"), "bare")
    report = compare(asked, interrupt)
    (summary,) = report.summaries()
    assert summary.row.label == "bare graphs int8, batch 16, greedy"
    assert summary.medians.tokens == 3
    assert report.failures == {"the rest": "interrupted"}
