"""The encoder and the decoder as models of this Triton server."""

from __future__ import annotations

import uuid

from captionserve_server.core.step_model import (
    Float32Array,
    Int64Array,
    StepAnswer,
    StepBatch,
    UInt8Array,
)
from captionserve_server.triton import wire
from captionserve_server.triton.decoder_step import FREE, PREFILL, STEP, step_tensors
from captionserve_server.triton.pb import Array, call_model, text_array
from captionserve_server.triton.wire import TensorSpec


class TritonEncoder:
    """vision_encoder of one version, called from inside Triton: an ImageEncoder."""

    def __init__(self, version: int) -> None:
        """Bind to vision_encoder's `version`."""
        self._version = version

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """uint8 [images, 3, height, width] to float32 [images, image tokens, encoder width]."""
        (states,) = call_model(
            wire.VISION_ENCODER,
            self._version,
            {wire.PIXELS: pixels},
            wire.ENCODER_STATES,
        )
        return states


class TritonStepModel:
    """decoder_step of one version, called from inside Triton: a StepModel."""

    def __init__(self, role: str, version: int) -> None:
        """Bind to decoder_step's `version` as a new owner of slots, in the place of `role`'s last.

        Args:
            role: the calling model's name.
            version: of decoder_step.
        """
        self._owner = f"{role}/{uuid.uuid4().hex}"
        self._version = version

    def prefill(self, states: Float32Array) -> Int64Array:
        """[images, S, E] to slots [images]; NO_SLOT where there was no room."""
        (slots,) = self._call(PREFILL, {wire.IMAGE_STATES: states}, wire.NEW_SLOTS)
        return slots

    def step(self, batch: StepBatch) -> StepAnswer:
        """One token of every row."""
        return StepAnswer(*self._call(STEP, step_tensors(batch), *wire.STEP_OUTPUTS))

    def free(self, slots: Int64Array) -> None:
        """Give slots back."""
        self._call(FREE, {wire.SLOTS: slots})

    def _call(
        self, operation: str, inputs: dict[TensorSpec, Array], *outputs: TensorSpec
    ) -> list[Array]:
        who = {wire.OPERATION: text_array(operation), wire.OWNER: text_array(self._owner)}
        return call_model(wire.DECODER_STEP, self._version, who | inputs, *outputs)
