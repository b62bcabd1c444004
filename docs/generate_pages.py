"""Write the pages of options, settings, metrics and interfaces from what the code says of each.

usage: python docs/generate_pages.py [--check]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from itertools import starmap
from pathlib import Path

import captionserve
from api_page import api_page
from captionserve_server.cli.settings_options import flag, variable
from captionserve_server.core.options import OPTIONS, DecodingOptions
from captionserve_server.gateway.metrics import SHOWN, GatewayMetrics
from captionserve_server.gateway.stages import STAGES
from captionserve_server.settings import Settings
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
_PUBLIC = (
    *(f"captionserve.{name}" for name in captionserve.__all__),
    "captionserve_server.local.LocalCaptioner",
)

_OPTIONS_HEAD = """# Decoding options

Names, meanings and defaults are those of transformers' GenerationConfig; a checkpoint's own
defaults come before these. Types are JSON's, as the tensor OPTIONS has them. `make generate`
writes this page.

| option | type | range | default | what it does |
|---|---|---|---|---|
"""


_PYTHON_HEAD = """# The Python client

`pip install ./client`; it needs grpcio, grpcio-status and protobuf only. [Clients](clients.md) is
the guide, [options](options.md) says what each option means, [errors](errors.md) what can go wrong.
The edge mode's `LocalCaptioner` comes last. `make generate` writes this page.
"""

_SETTINGS_HEAD = """# Settings of a service

Each is a flag of `captionserve serve` and an environment variable; the flag prevails.
`captionserve serve --print-config` prints what holds. `make generate` writes this page.

| flag | variable | default | what it does |
|---|---|---|---|
"""


_METRICS_HEAD = """# Metrics

The gateway's, at `--metrics-listen`, for Prometheus. `make generate` writes this page.

| metric | type | labels | what it says |
|---|---|---|---|
"""

_STAGES_HEAD = """
The gateway's process itself is in `captionserve_process_*`: memory, time, open files.

## Stages

The label `stage` of `captionserve_stage_seconds`, the `stages` of a line in the log, and the spans
below a call in its trace:

| stage | what it is |
|---|---|
"""

_DECODER = """
## Triton's own

At `triton_metrics` of the ready file, beside Triton's own `nv_*`; the label `version` names the
version of the model.

| metric | type | what it says |
|---|---|---|
| `captionserve_slots` | gauge | Captions that can be decoded at once. |
| `captionserve_slots_used` | gauge | Captions being decoded. |
| `captionserve_waiting_captions` | gauge | Captions without a slot. |
| `captionserve_kv_cache_bytes` | gauge | Memory of the keys and values in use. |
| `captionserve_engine_steps_total` | counter | Decoding steps. |
| `captionserve_engine_seconds_total` | counter | Time spent decoding. |
| `captionserve_image_seconds_total` | counter | Time spent on images, over all threads. |
| `captionserve_prefill_seconds_total` | counter | Time in the prefill graph. |
| `captionserve_step_seconds_total` | counter | Time in the step graph. |
| `captionserve_top_seconds_total` | counter | Time in the graph of the best tokens. |
"""


def pages() -> dict[Path, str]:
    """The pages whole, by their paths."""
    options = map(_option, dataclasses.fields(DecodingOptions))
    settings = starmap(_setting, Settings.model_fields.items())
    return {
        DOCS / "options.md": _OPTIONS_HEAD + "".join(map(_row, options)),
        DOCS / "settings.md": _SETTINGS_HEAD + "".join(map(_row, settings)),
        DOCS / "metrics.md": _metrics(),
        DOCS / "python.md": _PYTHON_HEAD + "".join(map(_documented, _PUBLIC)),
        DOCS / "api.md": api_page(),
    }


def _documented(name: str) -> str:
    """What the site's builder replaces by the docstrings of a name."""
    return f"\n::: {name}\n"


def _metrics() -> str:
    metrics = GatewayMetrics()
    metrics.show(dict.fromkeys(SHOWN, lambda: 0.0))
    described = sorted(metrics.described)
    rows = [(f"`{each.name}`", each.kind, _names(each.labels), each.text) for each in described]
    stages = [(f"`{name}`", text) for name, text in STAGES.items()]
    return "".join((_METRICS_HEAD, *map(_row, rows), _STAGES_HEAD, *map(_row, stages), _DECODER))


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _setting(name: str, field: FieldInfo) -> tuple[str, ...]:
    if field.is_required():
        default = "required"
    else:
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
    return f"`{flag(name)}`", f"`{variable(name)}`", default, field.description or ""


def _option(field: dataclasses.Field[object]) -> tuple[str, ...]:
    option = OPTIONS[field.name]
    kind = option.wanted().removeprefix("an ").removeprefix("a ")
    limits = [option.range()]
    if option.max_characters is not None:
        limits.append(f"at most {option.max_characters} characters")
    if option.max_items is not None:
        kind = f"list of {kind}s"
        limits.insert(0, f"at most {option.max_items}")
    default = "any" if field.default is None else f"`{json.dumps(field.default)}`"
    return f"`{field.name}`", kind, ", ".join(filter(None, limits)), default, option.help


def main(arguments: list[str]) -> int:
    """Write the pages, or check that they are up to date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    stale = 0
    for path, text in pages().items():
        if not arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"docs/{path.name} is out of date; run make generate\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
