"""Putting a benchmark together: systems, rounds, machine, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import AutoConfig

from captionserve_server.bench.images import bench_images
from captionserve_server.bench.machine import MachineProbe, machine_facts
from captionserve_server.bench.peers.engine import BareGraphs, Edge
from captionserve_server.bench.peers.generate import load_transformers, optimum_peer
from captionserve_server.bench.peers.naive import naive_triton_peer
from captionserve_server.bench.peers.service import service_peer
from captionserve_server.bench.peers.system import IN_BULK, Load, Peer
from captionserve_server.bench.peers.worker import running_worker
from captionserve_server.bench.report import Comparison, Report
from captionserve_server.bench.rounds import Rounds
from captionserve_server.bench.rows import PeerPlan, rows_of
from captionserve_server.export.precision import Precision
from captionserve_server.export.repository import export_checkpoint

# Different pictures.
_PICTURES = 32
_OPTIMUM_FOLDER = Path("build/bench/optimum")

Progress = Callable[[str], None]
"""Told what begins."""


class NothingToMeasureError(ValueError):
    """No row is asked for."""


def compare(comparison: Comparison, progress: Progress) -> Report:
    """Start the systems that rows ask for, measure them in turns, and end them.

    A system that cannot be started, or fails, does not cost the others' figures: why is in the
    report. Neither does an interruption, after hours, cost what has been measured.

    Raises:
        NothingToMeasureError: if no row matches the patterns.
    """
    config = AutoConfig.from_pretrained(comparison.checkpoint)
    report = Report(comparison, machine_facts(), config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captionserve-")))
        plans = _plans(comparison.checkpoint, _exported(comparison, folder, progress))
        rows = rows_of(plans, comparison.num_beams, comparison.patterns)
        if not rows:
            raise NothingToMeasureError("no row is called that")
        wanted = {row.peer for row in rows}
        peers: dict[str, Peer] = {}
        for plan in plans:
            if plan.name in wanted:
                progress(f"starting {plan.name}")
                try:
                    peers[plan.name] = stack.enter_context(plan.start())
                except Exception as error:  # Each system fails in its own way.
                    report.failures[plan.name] = f"{type(error).__name__}: {error}"
        try:
            rounds = Rounds(peers, bench_images(_PICTURES), report, progress)
            rounds.measure(rows, MachineProbe().measure)
        except KeyboardInterrupt:
            if not report.rounds:
                raise
            report.failures["the rest"] = "interrupted"
    return report


def _exported(comparison: Comparison, folder: Path, progress: Progress) -> dict[Precision, Path]:
    """All model repositories: those that are there, and what is exported into `folder`."""
    repositories = {}
    for precision, repository in comparison.repositories.items():
        if repository is None:
            progress(f"exporting {precision.value}")
            repository = folder / precision.value
            export_checkpoint(comparison.checkpoint, repository, precision=precision)
        repositories[precision] = repository
    return repositories


def _plans(checkpoint: str, repositories: Mapping[Precision, Path]) -> list[PeerPlan]:
    """The systems that can be compared."""
    batches = [Load(1, "batch"), Load(8, "batch")]
    few_calls = [Load(calls, "in flight") for calls in (1, 16)]
    calls = [Load(calls, "in flight") for calls in (1, 4, 16, 32, 64)]
    streams_among_calls = Load(32, "in flight", streams=16)
    at_once = [Load(calls, "at once") for calls in (1, 16)]
    # As many images as with 16 calls.
    in_bulk = Load(16, IN_BULK)
    transformers = partial(running_worker, partial(load_transformers, checkpoint))
    optimum = partial(optimum_peer, checkpoint, _OPTIMUM_FOLDER)
    plans = [
        PeerPlan("transformers", Precision.FP32, batches, transformers),
        PeerPlan("naive Triton", Precision.FP32, few_calls, partial(naive_triton_peer, checkpoint)),
        PeerPlan("optimum", Precision.FP32, batches, optimum),
    ]
    for precision, repository in repositories.items():
        name = precision.value
        graphs = partial(running_worker, partial(BareGraphs, repository))
        edge = partial(running_worker, partial(Edge, repository))
        service = partial(service_peer, repository)
        plans += [
            PeerPlan(f"bare graphs {name}", precision, [Load(16, "batch")], graphs),
            PeerPlan(f"edge {name}", precision, [*at_once, in_bulk], edge),
            PeerPlan(
                f"captionserve {name}", precision, [*calls, streams_among_calls, in_bulk], service
            ),
        ]
    return plans
