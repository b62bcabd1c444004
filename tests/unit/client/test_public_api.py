"""The client's public names, and that it needs no more than it says."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys

import captionserve
import grpc
import pytest
from captionserve import (
    AsyncCaptionClient,
    Attention,
    Caption,
    CaptionClient,
    CaptionError,
    CaptionResult,
    CaptionUpdate,
    DescribedRegion,
    FinishReason,
    GenerationOptions,
)


def test_exports_exactly_the_public_names() -> None:
    assert set(captionserve.__all__) == {
        "AltText",
        "AltTextWarning",
        "AsyncCaptionClient",
        "Attention",
        "BeamFate",
        "BeamHistory",
        "BeamPath",
        "Caption",
        "CaptionClient",
        "CaptionError",
        "CaptionResult",
        "CaptionUpdate",
        "Continuation",
        "DescribedRegion",
        "FinishReason",
        "Framing",
        "GenerationOptions",
        "ImageInput",
        "ImageToTextPipeline",
        "LikelyToken",
        "ModelInfo",
        "Models",
        "OptionLimits",
        "Outcome",
        "ReviewReason",
        "Stage",
        "Word",
        "pipeline",
        "tls_credentials",
    }
    assert all(hasattr(captionserve, name) for name in captionserve.__all__)


def test_other_modules_are_private_or_generated() -> None:
    modules = {name.split(".")[1] for name in sys.modules if name.startswith("captionserve.")}
    assert {name for name in modules if not name.startswith("_")} <= {"v1"}


def test_imports_neither_numpy_nor_pillow_nor_the_server() -> None:
    code = (
        "import sys, captionserve; "
        "sys.exit(', '.join({'numpy', 'PIL', 'captionserve_server'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["caption", "caption_stream", "close"])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    blocking = inspect.signature(getattr(CaptionClient, name))
    awaited = inspect.signature(getattr(AsyncCaptionClient, name))
    assert list(blocking.parameters.values()) == list(awaited.parameters.values())


@pytest.mark.parametrize(
    "value_type",
    [GenerationOptions, CaptionResult, DescribedRegion, Caption, Attention, CaptionUpdate],
)
def test_values_are_frozen(value_type: type) -> None:
    assert getattr(value_type, "__dataclass_params__").frozen  # noqa: B009


def test_options_are_all_unset_by_default() -> None:
    assert set(dataclasses.asdict(GenerationOptions()).values()) == {None}


def test_finish_reason_is_text() -> None:
    assert f"{FinishReason.EOS}" == FinishReason.EOS.value == "eos"
    assert isinstance(FinishReason.EOS, str)


def test_error_survives_pickling() -> None:
    code = grpc.StatusCode.INVALID_ARGUMENT
    error = CaptionError(code, "INVALID_OPTIONS", "wrong", {"options.num_beams": "too many"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.reason, copy.message) == (code, "INVALID_OPTIONS", "wrong")
    assert copy.field_violations == {"options.num_beams": "too many"}
    assert str(copy) == "INVALID_OPTIONS: wrong"
