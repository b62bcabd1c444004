"""`captionserve load` against a real service: every call counted, whatever its speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.bench.load.arrivals import poisson_arrivals
from captionserve_server.serving.ready import ReadyReport
from PIL import Image

from tests.conftest import DEMO
from tests.e2e.test_cli import run

RATES = (4.0, 8.0)
SECONDS = 4.0
IMAGES = 4


def arrivals_of(rate: float, cached_share: float) -> int:
    """The calls that count: those after the first tenth of the time."""
    arrivals = poisson_arrivals(rate, SECONDS, images=IMAGES, cached_share=cached_share, seed=7)
    return sum(each.due >= SECONDS / 10 for each in arrivals)


@pytest.mark.parametrize("cached_share", [0.0, 1.0])
def test_every_call_of_a_load_has_its_place_in_the_report(
    service: Callable[[str], ReadyReport], tmp_path: Path, cached_share: float
) -> None:
    found, chart = tmp_path / "load.json", tmp_path / "load.png"
    process = run(
        *("load", "--target", service(DEMO).grpc, "--seconds", str(SECONDS), "--seed", "7"),
        *(argument for rate in RATES for argument in ("--rates", str(rate))),
        # So long that no machine misses them.
        *("--deadline", "30", "--p99-seconds", "20", "--connections", "2"),
        *("--images", str(IMAGES), "--cached-share", str(cached_share)),
        *("--json", str(found), "--chart", str(chart)),
    )
    assert process.returncode == 0, process.stderr
    assert "8 images/s were held, and maybe more" in process.stdout
    text = found.read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert report["knee"] == {"rate": RATES[1], "missed": None, "certain": False}
    assert report["model"]["precision"] == "fp32"
    for rate, row in zip(RATES, report["rows"], strict=True):
        assert row["rate"] == rate
        assert row["calls"] == arrivals_of(rate, cached_share)
        assert row["codes"] == {"OK": row["calls"]}
        assert row["cached"] == cached_share * row["calls"]
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    with Image.open(chart) as picture:
        assert picture.format == "PNG"


def test_what_no_service_holds_is_an_exit_code_of_its_own(
    service: Callable[[str], ReadyReport],
) -> None:
    process = run(
        *("load", "--target", service(DEMO).grpc, "--rates", "2", "--seconds", "2"),
        *("--images", "1", "--p99-seconds", "0.001"),
    )
    assert process.returncode == 1, process.stderr
    assert "no rate was held" in process.stdout
    assert "error: no rate was held" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of the two"),
        (("--target", "127.0.0.1:1", "--repository", "."), "one of the two"),
        (("--target", "127.0.0.1:1", "--replicas", "2"), "for --repository alone"),
        (("--target", "127.0.0.1:1", "--deadline", "1"), "less than --deadline"),
        (("--repository", ".", "--cores-each", "4096"), "4096 cores are wanted"),
    ],
)
def test_what_cannot_be_asked_is_wrong_usage(arguments: tuple[str, ...], said: str) -> None:
    process = run("load", *arguments)
    assert process.returncode == 2
    # Not as it is broken into lines.
    assert said in " ".join(process.stderr.replace("│", " ").split())
