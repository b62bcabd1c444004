"""`captionserve calibrate` on a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from captionserve_server.core.confidence import SIGNALS, Calibration

from tests.conftest import DEMO
from tests.e2e.test_cli import run

KINDS = {"unseen_combinations", "unseen_style"}


def test_calibrate_fits_measures_and_writes(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    written = tmp_path / "confidence.json"
    process = run(
        *("calibrate", "--checkpoint", str(checkpoint_folder(DEMO))),
        *("--fit-scenes", "100", "--scenes", "60", "--json", "--output", str(written)),
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    calibration = Calibration.from_json(written.read_text())
    assert calibration == Calibration.from_values(report["calibration"])
    assert set(report["fits"]) == set(SIGNALS)
    assert set(report["calibration"]) == {*SIGNALS, "records", "image"}
    assert any(calibration.image)
    for name, fit in report["fits"].items():
        before, after = fit["uncalibrated"], fit["calibrated"]
        assert before["count"] == after["count"]
        assert (after["count"] == 120) is name.endswith("caption")
        assert len(after["bins"]) == 10
        assert after["expected_calibration_error"] < before["expected_calibration_error"]
        assert after["brier_score"] < before["brier_score"]
        assert set(fit["by_kind"]) == set(fit["signals"]) == KINDS


def test_calibrate_says_why_it_cannot(
    checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    written = tmp_path / "confidence.json"
    # Random weights get no caption right.
    process = run(
        *("calibrate", "--checkpoint", str(checkpoint_folder("two_ends"))),
        *("--fit-scenes", "2", "--scenes", "2", "--output", str(written)),
    )
    assert process.returncode == 1
    assert "both right and wrong captions are needed" in process.stderr
    assert "Traceback" not in process.stderr
    assert not written.exists()
