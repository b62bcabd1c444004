"""How `serve` tells the decoder's process what images may take while they are decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping

from captionserve_server.core.decode_budget import BYTES_PER_MEGABYTE, DEFAULT_DECODE_MEGABYTES

DECODE_MEGABYTES_VARIABLE = "CAPTIONSERVE_DECODE_MEGABYTES"
"""Environment variable with the megabytes of all images that are decoded at once."""


def decode_budget_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The bytes of all images that are decoded at once: the environment's, or the default.

    Args:
        environment: may have DECODE_MEGABYTES_VARIABLE.
    """
    megabytes = int(environment.get(DECODE_MEGABYTES_VARIABLE, DEFAULT_DECODE_MEGABYTES))
    return megabytes * BYTES_PER_MEGABYTE
