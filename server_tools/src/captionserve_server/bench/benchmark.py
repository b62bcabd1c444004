"""Putting a benchmark together: images, systems, rounds, machine, report."""

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
from captionserve_server.bench.peers.worker import running_worker
from captionserve_server.bench.report import Comparison, Report
from captionserve_server.bench.rounds import Rounds
from captionserve_server.bench.rows import Load, Options, Peer, PeerPlan, rows_of

WORK_FOLDER = Path("build/bench")
"""Kept for the next time: full-size weights, optimum."""

# Different pictures; a run that captions more begins again with the first.
_PICTURES = 32

Progress = Callable[[str], None]
"""Told what begins."""


class NothingToMeasureError(ValueError):
    """No row is asked for."""


def full_size_checkpoint() -> Path:
    """A random checkpoint of nlpconnect's shapes, made when it is not there."""
    # Imported here: PyTorch takes seconds to import, and most runs do without it in this process.
    from captionserve_server.export.random_checkpoint import CheckpointShape, make_checkpoint

    checkpoint = WORK_FOLDER / "full-size"
    if not checkpoint.exists():
        WORK_FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK_FOLDER) as draft:
            made = Path(draft) / "checkpoint"
            make_checkpoint(made, CheckpointShape())
            made.rename(checkpoint)
    return checkpoint


def compare(comparison: Comparison, progress: Progress) -> Report:
    """Start the systems that rows ask for, measure them in turns, and end them.

    A system that cannot be started, or fails, does not cost the others' figures: why is in the
    report. Neither does an interruption, after hours, cost what has been measured.

    Raises:
        NothingToMeasureError: if no row matches the patterns.
    """
    config = AutoConfig.from_pretrained(comparison.checkpoint)
    report = Report(comparison, machine_facts(), config)
    measurements = report.measurements
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captionserve-")))
        plans = _plans(comparison.checkpoint, _exported(comparison, folder, progress))
        report.rows = rows_of(plans, comparison.num_beams, comparison.patterns)
        if not report.rows:
            raise NothingToMeasureError("no row is called that")
        wanted = {row.peer for row in report.rows}
        peers: dict[str, Peer] = {}
        for plan in plans:
            if plan.name in wanted:
                progress(f"starting {plan.name}")
                try:
                    peers[plan.name] = stack.enter_context(plan.start())
                except Exception as error:  # Each system fails in its own way.
                    measurements.failures[plan.name] = f"{type(error).__name__}: {error}"
        report.versions = {name: peer.versions for name, peer in peers.items()}
        probe = MachineProbe()
        lengths: Options = {}
        if comparison.forced_tokens is not None:
            # Lengths count the start token.
            lengths = dict.fromkeys(("min_length", "max_length"), comparison.forced_tokens + 1)
        rounds = Rounds(peers, comparison.images, lengths, measurements, progress)
        try:
            rounds.measure(
                report.rows, comparison.rounds, lambda: report.rates.append(probe.measure())
            )
        except (KeyboardInterrupt, SystemExit):
            if not measurements.samples:
                raise
            measurements.failures["the rest"] = "interrupted"
    return report


def _exported(comparison: Comparison, folder: Path, progress: Progress) -> Mapping[str, Path]:
    """Model repositories by precision: those that are there, and what is exported into `folder`."""
    repositories = dict(comparison.repositories)
    for precision in comparison.precisions:
        # Imported here: as above.
        from captionserve_server.export.logs import quiet_libraries
        from captionserve_server.export.repository import export_checkpoint

        # Once more: onnxruntime's quantisers turn the root logger up when they are imported.
        quiet_libraries()
        progress(f"exporting {precision.value}")
        repositories[precision.value] = folder / precision.value
        export_checkpoint(comparison.checkpoint, repositories[precision.value], precision=precision)
    return repositories


def _plans(checkpoint: str, repositories: Mapping[str, Path]) -> list[PeerPlan]:
    """The systems that can be compared."""
    images = bench_images(_PICTURES)
    batches = [Load(1, "batch"), Load(8, "batch")]
    few_calls = [Load(calls, "in flight") for calls in (1, 16)]
    calls = [Load(calls, "in flight") for calls in (1, 4, 16, 32, 64)]
    at_once = [Load(calls, "at once") for calls in (1, 16)]
    transformers = partial(running_worker, partial(load_transformers, checkpoint, images))
    optimum = partial(optimum_peer, checkpoint, images, WORK_FOLDER / "optimum")
    naive = partial(naive_triton_peer, checkpoint, images)
    plans = [
        PeerPlan("transformers", "fp32", batches, transformers),
        PeerPlan("naive Triton", "fp32", few_calls, naive),
        PeerPlan("optimum", "fp32", batches, optimum),
    ]
    for name, repository in repositories.items():
        graphs = partial(running_worker, partial(BareGraphs, repository, images))
        edge = partial(running_worker, partial(Edge, repository, images))
        service = partial(service_peer, repository, images)
        plans += [
            PeerPlan(f"bare graphs {name}", name, [Load(16, "batch")], graphs),
            PeerPlan(f"edge {name}", name, at_once, edge),
            PeerPlan(
                f"captionserve {name}", name, [*calls, Load(32, "in flight", streams=16)], service
            ),
        ]
    return plans
