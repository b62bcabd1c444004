"""Images per second of the service against transformers' generate(), in turns, in one run.

    python -m captionserve_server.bench.throughput [--checkpoint DIR] [--rounds N]

Both caption the same held-out scenes with 4 beams and the checkpoint's own lengths. Each round
measures every row once, so that a machine that slows down slows all of them; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from captionserve import CaptionClient, GenerationOptions
from PIL import Image
from rich.console import Console
from rich.table import Table

from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.export.logs import quiet_libraries
from captionserve_server.serving.temporary import served_checkpoint

NUM_BEAMS = 4
IMAGES = 32
_TIMEOUT_SECONDS = 300.0

Images = list[Image.Image]
Row = Callable[[Images], object]


def transformers_row(checkpoint: str, batch_size: int) -> Row:
    """generate() in this process, `batch_size` images at a time."""
    import torch
    from transformers import AutoImageProcessor, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)

    def run(images: Images) -> None:
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            pixels = processor(batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                model.generate(pixel_values=pixels, num_beams=NUM_BEAMS)

    return run


def service_row(client: CaptionClient, in_flight: int) -> Row:
    """The service through its typed client, with `in_flight` requests at once."""
    options = GenerationOptions(num_beams=NUM_BEAMS)

    def run(images: Images) -> None:
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(lambda image: client.caption(image, options, bypass_cache=True), images))

    return run


def measure(rows: dict[str, Row], images: Images, rounds: int) -> dict[str, list[float]]:
    """Images per second of each row in each round, after one round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for round_number in range(rounds + 1):
        for name, run in rows.items():
            begin = time.perf_counter()
            run(images)
            if round_number > 0:
                rates[name].append(len(images) / (time.perf_counter() - begin))
    return rates


def as_table(rates: dict[str, list[float]]) -> Table:
    """Medians, spread, and the ratio to the first row."""
    table = Table("row", "images/s", "lowest", "highest", "against the first")
    reference = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        median = statistics.median(values)
        cells = (median, min(values), max(values), median / reference)
        table.add_row(name, *(f"{value:.2f}" for value in cells))
    return table


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description="The service against transformers' generate().")
    parser.add_argument("--checkpoint", default="demo/checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet_libraries()
    images = [scene.image for scene in held_out_scenes("unseen_combinations", IMAGES, seed=1)]
    console = Console()
    with (
        served_checkpoint(arguments.checkpoint, console.print) as service,
        CaptionClient(service.grpc, timeout=_TIMEOUT_SECONDS) as client,
    ):
        rows = {
            "transformers, batch 1": transformers_row(arguments.checkpoint, 1),
            "transformers, batch 8": transformers_row(arguments.checkpoint, 8),
            "captionserve, 1 in flight": service_row(client, 1),
            "captionserve, 16 in flight": service_row(client, 16),
        }
        console.print(as_table(measure(rows, images, arguments.rounds)))


if __name__ == "__main__":
    main()
