"""Sixteen callers at once, run by the edge image's Python; what became of their calls, as JSON.

usage: python callers.py TARGET CA_FILE TOKEN_FILE FOLDER_OF_PICTURES
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from captionserve import CaptionClient, GenerationOptions, tls_credentials

AT_ONCE = 16
ROUNDS = 2
# 16 tokens behind the start token: random weights end no caption by themselves.
OPTIONS = GenerationOptions(num_beams=4, min_length=17, max_length=17)


def main(target: str, ca: str, token_file: str, folder: str) -> None:
    """Call for each picture several times, and print the report."""
    pictures = [path.read_bytes() for path in sorted(Path(folder).iterdir())] * ROUNDS
    token = Path(token_file).read_text()
    with CaptionClient(target, credentials=tls_credentials(ca), token=token) as client:

        def seconds(picture: bytes) -> float:
            began = time.monotonic()
            result = client.caption(picture, OPTIONS, timeout=120, bypass_cache=True)
            assert len(result.captions[0].token_ids) == 16
            return time.monotonic() - began

        with ThreadPoolExecutor(AT_ONCE) as pool:
            began = time.monotonic()
            took = list(pool.map(seconds, pictures))
            whole = time.monotonic() - began
    report = {
        "calls": len(pictures),
        "captions": len(took),
        "images_per_second": round(len(took) / whole, 2),
        "median_seconds": round(statistics.median(took), 2),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
