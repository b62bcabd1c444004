"""Batches of tables captioned by the actors of a Ray cluster.

Ray Data hands batches to a pool of actors, as many at a time as are being captioned, and has those
of an actor that died captioned by its successor. Only the numbers of rows go through Ray: an actor
reads its batch, captions it and writes its part, with files that all nodes see. Ray may well do so
twice with a batch; parts.py says why its rows are there once all the same.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import ray
import ray.data
from captionserve import CaptionError

from captionserve_server.bulk.captioners import Captioner, DifferentModelsError, common_model
from captionserve_server.bulk.parts import Batch, BatchWork, ClusterError, DeadlyBatchError
from captionserve_server.bulk.run import Progress
from captionserve_server.bulk.sources import SourceError

MakeCaptioners: TypeAlias = Callable[[], AbstractContextManager[Sequence[Captioner]]]
"""Called in the process that shall caption; can be pickled."""

# While one batch ends, the next one is under way.
_BATCHES_AT_ONCE = 2
# Ray Data spends a millisecond on each before it begins.
_MOST_BLOCKS = 1000
_CONNECT_SECONDS = 10.0
_OBJECT_STORE_BYTES = 128 * 2**20
# Ray Data tells of what an actor raised as text with a traceback. That is right for faults of ours;
# these say what a person can do.
_TOLD = (CaptionError, DeadlyBatchError, DifferentModelsError, SourceError, OSError)


@contextmanager
def cluster(address: str | None, local_cores: int) -> Iterator[None]:
    """Be connected to a Ray cluster.

    Args:
        address: HOST:PORT, or "auto" for the one on this machine; None for the one that
            RAY_ADDRESS names, or, without it, for a Ray of so many cores that is ended at the end.
        local_cores: see there.

    Raises:
        ClusterError: if it does not answer.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray Data tells of each run, and that it draws no progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # What has become of a batch is told at once, not with all others of its block.
    ray.data.DataContext.get_current().target_max_block_size = 1
    try:
        with _as_cluster_errors():
            if address is None and "RAY_ADDRESS" not in os.environ:
                # Ray would send statistics of its use to its makers.
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                ray.init(
                    "local",
                    num_cpus=local_cores,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **quiet,
                )
            else:
                _check_reachable(address or os.environ["RAY_ADDRESS"])
                ray.init(address, **quiet)
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address of nobody, which Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):  # Such as auto.
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster can be reached at {address}") from error


def cores_of_each(actors: int) -> int:
    """How many cores each of so many actors can have; they must not be of two nodes."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(max(nodes), sum(nodes) // actors))


def described_model(make_captioners: MakeCaptioners, cores: int) -> dict[str, object]:
    """What the cluster captions with, as one of its nodes says.

    Raises:
        ClusterError: if none can be asked.
        Exception: what making captioners and asking them raises.
    """

    def described() -> dict[str, object]:
        with make_captioners() as captioners:
            return common_model(captioners)

    with _as_cluster_errors():
        model: dict[str, object] = ray.get(ray.remote(described).options(num_cpus=cores).remote())
    return model


def caption_batches(
    batches: Sequence[Batch],
    work: BatchWork,
    make_captioners: MakeCaptioners,
    model: Mapping[str, object],
    *,
    actors: int,
    cores: int,
) -> Iterator[Progress]:
    """Have batches captioned; what was done for each, as it becomes known.

    Args:
        batches: of one part each.
        work: what is to be done with each.
        make_captioners: called once in each actor.
        model: what all of them must caption with.
        actors: how many there are, at most one for each batch.
        cores: of each, which Ray keeps free for it.

    Raises:
        DifferentModelsError: if an actor has another model.
        DeadlyBatchError: if a batch has ended too many actors.
        ClusterError: if the cluster fails otherwise.
        Exception: what captioning raises.
    """
    if not batches:
        return
    blocks = min(len(batches), max(_MOST_BLOCKS, actors * _BATCHES_AT_ONCE))
    given = [dataclasses.asdict(batch) for batch in batches]
    done = ray.data.from_items(given, override_num_blocks=blocks).map(
        _Actor,
        fn_constructor_args=(work, make_captioners, model),
        num_cpus=cores,
        compute=ray.data.ActorPoolStrategy(
            size=min(actors, len(batches)),
            max_tasks_in_flight_per_actor=_BATCHES_AT_ONCE,
            max_concurrent_calls_per_actor=_BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
    )
    with _as_cluster_errors():
        for row in done.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


class _Actor:
    """A process that captions batches, several at once."""

    def __init__(
        self, work: BatchWork, make_captioners: MakeCaptioners, model: Mapping[str, object]
    ) -> None:
        self._work = work
        self._make_captioners = make_captioners
        self._model = model
        # What it holds lives as long as the process.
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._captioners: Sequence[Captioner] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the part of a batch, and tell what was done, or why nothing can be done."""
        outcome: Progress | Exception
        try:
            outcome = self._work.caption(Batch(**row), self._made_captioners())
        # Ray Data would tell of them as text alone. What is none of these is a fault of ours, of
        # which that text has all.
        except _TOLD as error:
            outcome = error
        return {"outcome": pickle.dumps(outcome)}

    def _made_captioners(self) -> Sequence[Captioner]:
        with self._lock:
            if self._captioners is None:
                made = self._stack.enter_context(self._make_captioners())
                if common_model(made) != self._model:
                    raise DifferentModelsError("the cluster's nodes differ in their model")
                self._captioners = made
            return self._captioners


@contextmanager
def _as_cluster_errors() -> Iterator[None]:
    """Raise what an actor raised, and what Ray itself has to say as a ClusterError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        # ValueError: what the client does not take, such as a certificate without its key.
        if isinstance(error.cause, (*_TOLD, ValueError)):
            raise error.cause from None
        raise
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ClusterError(str(error).splitlines()[0]) from error
