"""How a graph's weights are kept."""

from __future__ import annotations

import enum


class Precision(str, enum.Enum):
    """The precisions that `export` writes; see quantise.py for what they are."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"
