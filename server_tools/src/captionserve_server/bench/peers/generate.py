"""transformers' generate(), with its own models and with optimum's.

Optimum wants another transformers than we do, so it has a virtual environment, on top of ours: what
both can share is shared, above all PyTorch and ONNX Runtime, so that the comparison is of the
programs and not of their libraries' versions, and nothing large is installed twice.
"""

from __future__ import annotations

import io
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from captionserve_server.bench.peers.loads import run_in_batches
from captionserve_server.bench.peers.worker import WorkerPeer, running_worker
from captionserve_server.bench.rows import Load, Options, Run, TokenIds

# The last releases that go together.
_OPTIMUM = ("optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", "transformers==4.57.6")
_ERROR_CHARACTERS = 2000


class OptimumError(RuntimeError):
    """Optimum cannot be installed or cannot export the checkpoint; the message says why."""


class Generator:
    """A model with generate(), and its image processor."""

    def __init__(
        self, model: Any, checkpoint: str, images: Sequence[bytes], versions: Sequence[str]
    ) -> None:
        """Keep them.

        Args:
            model: of transformers or optimum.
            checkpoint: which has the image processor.
            images: JPEG files.
            versions: distributions to tell the versions of.
        """
        # Imported here: optimum's worker chooses which transformers before.
        from transformers import AutoImageProcessor

        self.versions = {name: version(name) for name in versions}
        self._model = model
        self._processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        self._images = images
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def run(self, images: int, load: Load, options: Options) -> Run:
        """Caption images in batches; see Captioner."""
        return run_in_batches(partial(self._captions, options), self._images, images, load)

    def _captions(self, options: Options, files: list[bytes]) -> list[TokenIds]:
        """Each file's tokens, without start token and padding, with the end token if produced."""
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


def load_transformers(checkpoint: str, images: Sequence[bytes]) -> Generator:
    """PyTorch and transformers in float32."""
    import torch
    from transformers import VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32)
    return Generator(model.eval(), checkpoint, images, ("transformers", "torch"))


def load_optimum(packages: str, folder: str, checkpoint: str, images: Sequence[bytes]) -> Generator:
    """ONNX Runtime under optimum's ORTModelForVision2Seq, in float32, from an exported folder."""
    sys.path.insert(0, packages)
    from optimum.onnxruntime import ORTModelForVision2Seq

    model = ORTModelForVision2Seq.from_pretrained(folder)
    distributions = ("optimum-onnx", "transformers", "onnxruntime", "torch")
    return Generator(model, checkpoint, images, distributions)


_EXPORT = """
import sys
from optimum.onnxruntime import ORTModelForVision2Seq
ORTModelForVision2Seq.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""


@contextmanager
def optimum_peer(
    checkpoint: str, images: Sequence[bytes], environment: Path
) -> Iterator[WorkerPeer]:
    """Optimum's model of a checkpoint.

    Args:
        checkpoint: a local folder or a hub id.
        images: JPEG files.
        environment: its virtual environment, made when it is not there, kept for the next time.

    Raises:
        OptimumError: if optimum cannot be installed or cannot export the checkpoint.
    """
    python, made_of = str(environment / "bin" / "python"), environment / "made-of"
    ours = sysconfig.get_path("purelib")
    packages = sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)})
    # What pip must not replace.
    shared = [f"{name}=={version(name)}" for name in ("torch", "onnxruntime", "numpy")]
    wanted = "\n".join([ours, *shared, *_OPTIMUM])
    if not made_of.exists() or made_of.read_text() != wanted:
        _run(sys.executable, "-m", "venv", "--clear", str(environment))
        Path(packages, "on_top_of.pth").write_text(f"{ours}\n")
        _run(python, "-m", "pip", "install", "--quiet", *shared, *_OPTIMUM)
        made_of.write_text(wanted)
    with tempfile.TemporaryDirectory(prefix="captionserve-optimum-") as folder:
        _run(python, "-c", _EXPORT, checkpoint, folder)
        with running_worker(partial(load_optimum, packages, folder, checkpoint, images)) as peer:
            yield peer


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptimumError(f"{Path(command[0]).name} failed\n{done.stderr[-_ERROR_CHARACTERS:]}")
