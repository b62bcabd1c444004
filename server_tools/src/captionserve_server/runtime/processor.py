"""What processor this is: its name, and the instruction sets that speed depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TELLING_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""By the kernel's names, the slowest first."""


@dataclass(frozen=True)
class Processor:
    """The machine's processor.

    Attributes:
        name: as it calls itself.
        instructions: those of TELLING_INSTRUCTIONS that it has, in that order.
    """

    name: str
    instructions: tuple[str, ...]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Read what the kernel says of the processor; of several, the last."""
    pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    said = {name.strip(): value.strip() for name, _, value in pairs}
    flags = said.get("flags", "").split()
    return Processor(
        said.get("model name", "unknown"),
        tuple(each for each in TELLING_INSTRUCTIONS if each in flags),
    )
