"""transformers' generate(), with its own models and with optimum's.

Optimum wants another transformers than we do, so both lie in a folder before ours. What they can
share is shared, above all PyTorch and ONNX Runtime, so that the comparison is of the programs and
not of their libraries' versions, and nothing large is installed twice.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from captionserve_server.bench.peers.system import Options, Peer, System, TokenIds
from captionserve_server.bench.peers.worker import running_worker
from captionserve_server.bench.programs import packages_in, run_program

# The last releases that go together; then what of ours is too new for them, or not there.
_OPTIMUM = (
    *("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6"),
    *("huggingface-hub==0.36.0", "tokenizers==0.22.1"),
    *("requests==2.32.5", "charset-normalizer==3.4.4"),
)
_EXPORT = """
import sys
sys.path.insert(0, sys.argv[1])
from optimum.onnxruntime import ORTModelForVision2Seq
ORTModelForVision2Seq.from_pretrained(sys.argv[2], export=True).save_pretrained(sys.argv[3])
"""


class Generator(System):
    """A model with generate(), and its image processor."""

    def __init__(self, model: Any, checkpoint: str) -> None:
        """Keep a model of transformers or optimum; the checkpoint has its image processor."""
        # Imported here: optimum's worker chooses which transformers before.
        from transformers import AutoImageProcessor

        self._model = model
        self._processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """Caption a batch; without start token and padding, and there are no streams."""
        import torch

        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = self._model.generate(pixel_values=pixels, **options)[:, 1:].tolist()
        captions = []
        for row in rows:
            ends = [place for place, token in enumerate(row) if token in self._ends]
            captions.append(tuple(row[: ends[0] + 1] if ends else row))
        return captions


def load_transformers(checkpoint: str) -> Generator:
    """PyTorch and transformers in float32."""
    import torch
    from transformers import VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32)
    return Generator(model.eval(), checkpoint)


def load_optimum(packages: str, exported: str, checkpoint: str) -> Generator:
    """ONNX Runtime under optimum's ORTModelForVision2Seq, in float32."""
    sys.path.insert(0, packages)
    from optimum.onnxruntime import ORTModelForVision2Seq

    return Generator(ORTModelForVision2Seq.from_pretrained(exported), checkpoint)


@contextmanager
def optimum_peer(checkpoint: str, folder: Path) -> Iterator[Peer]:
    """Optimum's model of a checkpoint; its packages are kept in `folder`.

    Raises:
        ProgramError: if optimum cannot be installed or cannot export the checkpoint.
    """
    packages = str(packages_in(folder, *_OPTIMUM))
    with tempfile.TemporaryDirectory(prefix="captionserve-optimum-") as exported:
        # In a process of its own: what an export leaves in memory is not the model's.
        run_program(sys.executable, "-c", _EXPORT, packages, checkpoint, exported)
        with running_worker(partial(load_optimum, packages, exported, checkpoint)) as peer:
            yield peer
