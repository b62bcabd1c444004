"""Putting a benchmark together: images, systems, rounds, machine, report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import AutoConfig

from captionserve_server.bench.cost_model import MachineRates, shape_of
from captionserve_server.bench.images import bench_images, write_images
from captionserve_server.bench.machine import MachineProbe, machine_facts
from captionserve_server.bench.peers.generate import optimum_peer, transformers_peer
from captionserve_server.bench.peers.graphs import graphs_peer
from captionserve_server.bench.peers.naive import naive_triton_peer
from captionserve_server.bench.peers.service import service_peer
from captionserve_server.bench.report import Report, Settings
from captionserve_server.bench.rounds import Measurements, Progress, Rounds
from captionserve_server.bench.rows import Peer, PeerPlan, Row, rows_of
from captionserve_server.export.precision import Precision

# Different pictures; a run that captions more begins again with the first.
_PICTURES = 32
_BATCHES = (1, 8)
_NAIVE_IN_FLIGHT = (1, 16)
_LIVE = (16,)
_IN_FLIGHT = (1, 4, 16, 64)


class NothingToMeasureError(ValueError):
    """No row is asked for."""


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        checkpoint: a local folder or a hub id.
        repositories: exported model repositories by precision.
        precisions: what to export the checkpoint in beside those.
        num_beams: the numbers of beams.
        patterns: shell patterns, of which one must match the beginning of a row's label.
        encode_batch: images that the bare loop encodes at once.
        work_folder: where optimum's environment is kept.
    """

    checkpoint: str
    repositories: Mapping[str, Path]
    precisions: Sequence[Precision]
    num_beams: Sequence[int]
    patterns: Sequence[str]
    encode_batch: int
    work_folder: Path


def full_size_checkpoint(folder: Path) -> Path:
    """A random checkpoint of nlpconnect's shapes, made when it is not there."""
    # Imported here: PyTorch takes seconds to import, and most runs do without it in this process.
    from captionserve_server.export.random_checkpoint import CheckpointShape, make_checkpoint

    checkpoint = folder / "full-size"
    if not checkpoint.exists():
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            made = Path(draft) / "checkpoint"
            make_checkpoint(made, CheckpointShape())
            made.rename(checkpoint)
    return checkpoint


def compare(comparison: Comparison, settings: Settings, progress: Progress) -> Report:
    """Start the systems that rows ask for, measure them in turns, and end them.

    Args:
        comparison: what to compare.
        settings: how to measure.
        progress: told what begins.

    Raises:
        NothingToMeasureError: if no row matches the patterns.
    """
    with _exported(comparison, progress) as repositories, _pictures() as pictures:
        plans = _peer_plans(comparison, repositories, pictures)
        rows = rows_of(plans, comparison.num_beams, comparison.patterns)
        if not rows:
            raise NothingToMeasureError("no row is called that")
        wanted = {row.peer for row in rows}
        return _measured(
            comparison,
            [plan for plan in plans if plan.name in wanted],
            rows,
            settings,
            progress,
        )


@contextmanager
def _exported(comparison: Comparison, progress: Progress) -> Iterator[Mapping[str, Path]]:
    """Model repositories by precision: those that are there, and what has to be exported."""
    with tempfile.TemporaryDirectory(prefix="captionserve-repository-") as folder:
        repositories = dict(comparison.repositories)
        for precision in comparison.precisions:
            repositories[precision.value] = Path(folder) / precision.value
            _export(comparison.checkpoint, repositories[precision.value], precision, progress)
        yield repositories


def _export(checkpoint: str, folder: Path, precision: Precision, progress: Progress) -> None:
    # Imported here: as above.
    from captionserve_server.export.logs import quiet_libraries
    from captionserve_server.export.repository import export_checkpoint

    # Once more: onnxruntime's quantisers turn the root logger up when they are imported.
    quiet_libraries()
    export_checkpoint(
        checkpoint,
        folder,
        precision=precision,
        progress=lambda stage: progress(f"{precision.value}: {stage}"),
    )


@contextmanager
def _pictures() -> Iterator[tuple[list[bytes], Path]]:
    """The pictures, and a folder that has them as files."""
    images = bench_images(_PICTURES)
    with tempfile.TemporaryDirectory(prefix="captionserve-pictures-") as folder:
        write_images(images, Path(folder))
        yield images, Path(folder)


def _peer_plans(
    comparison: Comparison,
    repositories: Mapping[str, Path],
    pictures: tuple[list[bytes], Path],
) -> list[PeerPlan]:
    """The systems that can be compared."""
    images, folder = pictures
    checkpoint = comparison.checkpoint
    environment = comparison.work_folder / "optimum"
    generate = partial(transformers_peer, checkpoint, folder)
    naive = partial(naive_triton_peer, checkpoint, images)
    optimum = partial(optimum_peer, checkpoint, folder, environment)
    plans = [
        PeerPlan("transformers", "fp32", "batch", _BATCHES, generate),
        PeerPlan("naive Triton", "fp32", "in flight", _NAIVE_IN_FLIGHT, naive),
        PeerPlan("optimum", "fp32", "batch", _BATCHES, optimum),
    ]
    for precision, repository in repositories.items():
        start = partial(graphs_peer, repository, folder, comparison.encode_batch)
        plans.append(PeerPlan(f"bare graphs {precision}", precision, "live", _LIVE, start))
    for precision, repository in repositories.items():
        serve = partial(service_peer, repository, images)
        name = f"captionserve {precision}"
        plans.append(PeerPlan(name, precision, "in flight", _IN_FLIGHT, serve))
    return plans


def _measured(
    comparison: Comparison,
    plans: Sequence[PeerPlan],
    rows: Sequence[Row],
    settings: Settings,
    progress: Progress,
) -> Report:
    rates: list[MachineRates] = []
    probe = MachineProbe()
    measurements = Measurements()
    with ExitStack() as stack:
        peers = _started(plans, stack, measurements, progress)
        versions = {name: peer.versions for name, peer in peers.items()}
        rounds = Rounds(peers, settings.images, settings.forced_tokens, progress)
        with _interruption_noted(measurements):
            rounds.measure(
                rows, settings.rounds, measurements, lambda: rates.append(probe.measure())
            )
    return Report(
        settings=settings,
        machine=machine_facts(),
        versions=versions,
        shape=shape_of(AutoConfig.from_pretrained(comparison.checkpoint)),
        rates=rates,
        rows=list(rows),
        measurements=measurements,
    )


@contextmanager
def _interruption_noted(measurements: Measurements) -> Iterator[None]:
    """Whoever ends a run of hours early keeps what has been measured."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not measurements.samples:
            raise
        measurements.failures["the rest"] = "interrupted"


def _started(
    plans: Sequence[PeerPlan], stack: ExitStack, measurements: Measurements, progress: Progress
) -> dict[str, Peer]:
    """The systems that could be started; why others could not is noted."""
    peers: dict[str, Peer] = {}
    for plan in plans:
        progress(f"starting {plan.name}")
        try:
            peers[plan.name] = stack.enter_context(plan.start())
        except Exception as error:  # One that cannot start must not cost the others' figures.
            measurements.failures[plan.name] = str(error)
    return peers
