"""`captionserve bench` on a tiny checkpoint: real workers, a real service, one round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.e2e.test_cli import run

SYSTEMS = (
    "transformers, batch 8",
    "bare graphs fp32, batch 16",
    "edge fp32, 16 at once",
    "captionserve fp32, 4 in flight",
    "captionserve fp32, 16 streams and 16 calls in flight",
)


def test_bench_compares_systems_that_give_the_same_captions(
    checkpoint_folder: Callable[[str], Path],
    model_repository: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    name = "projected"
    process = run(
        *("bench", "--checkpoint", str(checkpoint_folder(name)), "--tokens", "6"),
        *("--repository", f"fp32={model_repository(name)}", "--num-beams", "1"),
        *(argument for system in SYSTEMS for argument in ("--rows", system)),
        *("--rounds", "1", "--images", "8", "--reference", SYSTEMS[0]),
        *("--json", str(tmp_path / "bench.json"), "--chart", str(tmp_path / "bench.png")),
    )
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "bench.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert [row["label"] for row in report["rows"]] == [f"{system}, greedy" for system in SYSTEMS]
    for row in report["rows"]:
        assert row["same_captions"] == 1.0
        assert row["tokens"] == 6
        assert 0 < row["share_of_limit"] < 1
        assert row["images_per_second"] > 0
        assert row["memory_mib"] > 0
        assert row["label"] in process.stdout
    stages = report["rows"][3]["stages_ms"]
    counted = ("vision_encoder", "prefill", "step", "top", "engine", "image", "request")
    assert all(stages[stage] > 0 for stage in counted)
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.format == "PNG"
