"""What grounding costs: captions a second with it and without, in turns, in the edge mode.

    python -m captionserve_server.bench.grounding_cost MODEL_REPOSITORY [--images N] [--rounds N]

Prints JSON: the median seconds of each case, one image at a time and all together, and how many
times those of the plain case they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from captionserve_server.bench.images import bench_images
from captionserve_server.local import LocalCaptioner

_COMMAND = "python -m captionserve_server.bench.grounding_cost MODEL_REPOSITORY"
PLAIN = "plain"
CASES: dict[str, dict[str, Any]] = {
    PLAIN: {"num_beams": 4},
    "min_confidence": {"num_beams": 4, "min_confidence": 0.5},
    "output_grounding": {"num_beams": 4, "output_grounding": True},
    "rerank": {"num_beams": 4, "rerank": "grounding"},
    # Its log-probabilities are not the model's own, so that it is read with its image too.
    "output_grounding, penalised": {
        **{"num_beams": 4, "output_grounding": True},
        "repetition_penalty": 1.0001,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_repository")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    images = bench_images(given.images)
    seconds: dict[str, dict[str, list[float]]] = {
        way: {name: [] for name in CASES} for way in ("one at a time", "together")
    }
    with LocalCaptioner(given.model_repository) as captioner:
        captioner.caption_all(images[:4], output_grounding=True)
        for _ in range(given.rounds):
            for name, options in CASES.items():
                begin = time.perf_counter()
                for image in images:
                    captioner.caption(image, **options)
                alone = time.perf_counter()
                captioner.caption_all(images, **options)
                seconds["one at a time"][name].append(alone - begin)
                seconds["together"][name].append(time.perf_counter() - alone)
    report: dict[str, Any] = {
        "command": f"{_COMMAND} --images {given.images} --rounds {given.rounds}",
        "images": given.images,
        "rounds": given.rounds,
    }
    for way, cases in seconds.items():
        medians = {name: statistics.median(each) for name, each in cases.items()}
        report[way] = {
            name: {"seconds": round(median, 3), "times plain": round(median / medians[PLAIN], 3)}
            for name, median in medians.items()
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
