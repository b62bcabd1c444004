"""The `decoder` model: from images to captions, all requests in one batch, in one process.

    execute         accepts: reads the message, checks the options, makes room
    image threads   decode and resize the files
    engine          one thread: has newcomers encoded by `vision_encoder` and decodes everybody,
                    step by step, with the graphs and the KV cache of this process
    answering       one thread: makes and sends the answers, in their order

Streams and plain calls are rows of the same batch. When a thread ends by a bug, everybody who waits
is told, and the process ends, so that it can be started anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.decode_budget import DecodeBudget
from captionserve_server.core.engine.engine_thread import EngineThread
from captionserve_server.core.engine.scheduler import Scheduler, SchedulerLimits
from captionserve_server.core.engine.worker import WorkerPool
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    InvalidOptionsError,
    InvalidRequestError,
    ModelUnavailableError,
)
from captionserve_server.core.framing import Framing
from captionserve_server.core.options import parse_options
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    Views,
    pixels_of_values,
    preprocess,
)
from captionserve_server.core.results import Finisher
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import Float32Array, UInt8Array
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.cores import available_cores
from captionserve_server.runtime.decode_memory import decode_budget_bytes
from captionserve_server.runtime.decoder_graphs import open_decoder
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.tokenizer import CaptionTokenizer
from captionserve_server.triton import wire
from captionserve_server.triton.answers import Answering, Captioning
from captionserve_server.triton.callers import Caller, CallerWatch
from captionserve_server.triton.metrics import DecoderMetrics
from captionserve_server.triton.pb import (
    ModelArguments,
    Request,
    call_model,
    die,
    log_error,
    read,
    read_bytes,
    read_flag,
    response,
    show_life,
    text_array,
)

# At the end, what is in work may take this long each: a step, an image, an answer. A thread that
# takes longer is left behind; Triton ends the process in any case.
_CLOSE_SECONDS = 10.0
# Of the 64 MiB that a client takes.
_MAX_ATTENTION_BYTES = 48 << 20
# When a thread has died, for the last answers to leave.
_LAST_ANSWERS_SECONDS = 2.0


class TritonPythonModel:
    """Decodes all requests in flight together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load everything, and run each graph once, so that the first caption finds them warm."""
        show_life()
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        self._version = arguments.version
        self._bundle = Bundle.from_json((folder / files.BUNDLE_FILE).read_text())
        self._tokenizer = CaptionTokenizer.from_file(folder / files.TOKENIZER_FILE)
        settings = json.loads((folder / files.PREPROCESSOR_FILE).read_text())
        self._preprocessor = PreprocessorConfig.from_json(settings)
        graphs = open_decoder(
            folder,
            threads=arguments.threads("intra_op_thread_count"),
            spinning=bool(arguments.number("spinning")),
        )
        limits = SchedulerLimits(
            slots=arguments.number("slots"),
            max_rows=arguments.number("max_rows"),
            max_entries=arguments.number("max_entries"),
            max_admissions=arguments.number("max_admissions"),
        )
        self._slots = limits.slots
        step_model = GraphStepModel(graphs, self._bundle.geometry, limits.slots)
        step_model.warm_up()
        vocabulary = Vocabulary(self._bundle.special, self._bundle.geometry.vocabulary_size)
        scheduler = Scheduler(_Encoder(self._version), step_model, vocabulary, limits)
        self._ending = False
        self._metrics = DecoderMetrics(
            self._version, limits.slots, scheduler, step_model, self._die
        )
        self._watch = CallerWatch(self._die)
        self._finisher = Finisher(self._bundle, self._tokenizer.decode)
        self._answering = Answering(self._finisher, arguments.number("max_requests"), self._die)
        self._engine = EngineThread(
            scheduler, log_error, after_step=self._metrics.count_step, on_death=self._die
        )
        self._budget = DecodeBudget(decode_budget_bytes())
        threads = arguments.threads("image_threads") or available_cores()
        self._images = WorkerPool("image", threads, self._die)

    def execute(self, requests: list[Request]) -> None:
        """Accept the requests; they are answered later, through their response senders."""
        for request in requests:
            caller = Caller(request)
            try:
                self._accept(request, caller)
            except Exception as error:  # Whatever goes wrong is this request's answer.
                caller.fail(error)

    def finalize(self) -> None:
        """Answer everybody, and end the threads."""
        self._ending = True
        self._images.close(_CLOSE_SECONDS)
        self._engine.close(_CLOSE_SECONDS)
        self._answering.close(_CLOSE_SECONDS)
        self._watch.close(_CLOSE_SECONDS)
        self._metrics.close()

    def _accept(self, request: Request, caller: Caller) -> None:
        given_up = read_bytes(request, wire.CANCEL)
        if given_up is not None:
            self._watch.cancel(given_up.decode(errors="replace"))
            caller.finish(None)
            return
        if read_flag(request, wire.DESCRIBE):
            caller.finish(response({wire.DESCRIPTION: text_array(self._description())}))
            return
        framing = _framing(request)
        views = self._views(request, framing, caller)
        given = parse_options(read_bytes(request, wire.OPTIONS) or b"{}")
        plan = self._bundle.plan(given, self._tokenizer.encode)
        self._refuse_what_no_answer_holds(plan, framing)
        updates = self._finisher.updates(plan) if read_flag(request, wire.STREAM) else None
        self._answering.enter(framing.views)
        captioning = Captioning(self._answering, caller, plan, framing.views, updates)
        self._watch.add(caller)
        try:
            self._images.submit(partial(self._prepare, views, captioning), captioning.fail)
        except CaptionServeError as error:
            captioning.end(error)

    def _views(self, request: Request, framing: Framing, caller: Caller) -> Callable[[], Views]:
        """What prepares a message's image, and the parts of it that are asked for."""
        encoded, values = read_bytes(request, wire.IMAGE), read(request, wire.PIXEL_VALUES)
        if (encoded is None) == (values is None):
            raise InvalidRequestError(
                f"either {wire.IMAGE.name} or {wire.PIXEL_VALUES.name} must be given"
            )
        if encoded is not None:
            # Who has given up need not wait for memory any more.
            reserve = partial(
                self._budget.reserved, has_gone=lambda: caller.has_gone, deadline=caller.deadline
            )
            return partial(preprocess, encoded, self._preprocessor, reserve, framing)
        framing.refuse_for_pixel_values()
        # A copy: Triton takes the memory of its tensors back.
        own = np.array(values)
        return lambda: Views((pixels_of_values(own, self._preprocessor),))

    def _refuse_what_no_answer_holds(self, plan: CaptionPlan, framing: Framing) -> None:
        """Refuse attention of so many captions and parts that it fits into no message."""
        options, geometry = plan.options, self._bundle.geometry
        if not options.output_attentions:
            return
        maps = framing.views * options.num_return_sequences * options.max_length
        size = maps * geometry.grid_rows * geometry.grid_cols * np.dtype(np.float32).itemsize
        if size > _MAX_ATTENTION_BYTES:
            most = _MAX_ATTENTION_BYTES >> 20
            text = f"may take {size >> 20} MiB for all captions and parts, at most {most} fit"
            raise InvalidOptionsError({"output_attentions": text})

    def _prepare(self, prepared: Callable[[], Views], captioning: Captioning) -> None:
        """What an image thread does for a request."""
        if self._ending:
            raise ModelUnavailableError("the captioner is shutting down")
        if captioning.has_gone:
            raise CancelledError("the caller has gone")
        captioning.timeline.passed("image_queue")
        with self._metrics.image():
            views = prepared()
        captioning.boxes = views.boxes
        captioning.timeline.passed("preprocess")
        self._engine.submit(views.pixels, captioning.plan, captioning, captioning.timeline)

    def _description(self) -> str:
        return json.dumps(
            {
                "version": self._version,
                "defaults": self._bundle.defaults.as_given(),
                "slots": self._slots,
                "precision": self._bundle.precision,
                "image_size": self._preprocessor.output_size(),
            }
        )

    def _die(self, error: BaseException) -> None:
        """End the process, because a thread has ended that should not have."""
        self._ending = True
        self._engine.close(_LAST_ANSWERS_SECONDS)
        self._answering.close(_LAST_ANSWERS_SECONDS)
        die(error)


def _framing(request: Request) -> Framing:
    """What a message asks of its image; InvalidFramingError if that is wrong in any case."""
    regions, tiles = read(request, wire.REGIONS), read(request, wire.TILES)
    resize = read_bytes(request, wire.RESIZE)
    return Framing.of(
        None if regions is None else regions.tolist(),
        None if tiles is None else tiles.tolist(),
        None if resize is None else resize.decode(errors="replace"),
    )


class _Encoder:
    """`vision_encoder` of one version, called from inside Triton: an ImageEncoder."""

    def __init__(self, version: int) -> None:
        self._version = version

    def encode(self, pixels: UInt8Array) -> Float32Array:
        inputs = {wire.PIXELS: pixels}
        return call_model(wire.VISION_ENCODER, self._version, inputs, wire.ENCODER_STATES)
