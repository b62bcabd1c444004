"""What the kernel says of a processor."""

from __future__ import annotations

from pathlib import Path

from captionserve_server.runtime.processor import Processor, processor


def test_the_telling_instructions_are_picked_out(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Some Processor\nflags\t\t: fpu avx2 amx_tile amx_int8 "
        "avx512f avx512_vnni\n\nprocessor\t: 1\nmodel name\t: Some Processor\n"
    )
    found = ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert processor(cpuinfo) == Processor("Some Processor", found)


def test_another_kind_has_none_of_them(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert processor(cpuinfo) == Processor("unknown", ())
