"""The naive Triton model of naive_triton/, served by an embedded or installed Triton."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from captionserve_server.bench.peers.in_flight import CALL_SECONDS, run_in_flight
from captionserve_server.bench.rows import Decoding, Run, TokenIds
from captionserve_server.serving.installation import find_triton
from captionserve_server.serving.triton_process import TritonProcess

_MODEL = "naive"
_START_SECONDS = 300.0


class NaiveTritonPeer:
    """Drives the model with tritonclient."""

    def __init__(self, triton: TritonProcess, images: list[bytes]) -> None:
        """Connect to a ready Triton; images are JPEG files."""
        self._triton = triton
        self._images = images
        self._client = InferenceServerClient(triton.addresses.grpc)

    @property
    def pid(self) -> int:
        """Triton's process."""
        return self._triton.pid

    @property
    def versions(self) -> dict[str, str]:
        """What runs in it."""
        triton = self._client.get_server_metadata().version
        return {"tritonserver": triton, "transformers": version("transformers")}

    def run(self, images: int, load: int, decoding: Decoding) -> Run:
        """Caption the first `images` images with `load` requests in flight."""
        options = json.dumps(decoding.as_options()).encode()
        return run_in_flight(lambda image: self._call(image, options), images, load)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, image: int, options: bytes) -> TokenIds:
        answer = self._client.infer(
            _MODEL,
            [_text("IMAGE", self._images[image % len(self._images)]), _text("OPTIONS", options)],
            outputs=[InferRequestedOutput("TOKEN_IDS")],
            client_timeout=CALL_SECONDS,
        )
        return tuple(answer.as_numpy("TOKEN_IDS").tolist())


def _text(name: str, value: bytes) -> InferInput:
    tensor = InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value], dtype=np.object_))
    return tensor


@contextmanager
def naive_triton_peer(checkpoint: str, images: list[bytes]) -> Iterator[NaiveTritonPeer]:
    """The model on a Triton of its own, ended on leaving.

    Args:
        checkpoint: a local folder or a hub id.
        images: JPEG files.

    Raises:
        TritonNotFoundError: if there is no tritonserver.
        TritonStartError: if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="captionserve-naive-") as folder:
        _write_repository(Path(folder), checkpoint)
        triton = TritonProcess(find_triton(), Path(folder))
        try:
            asyncio.run(triton.wait_ready(_START_SECONDS))
            peer = NaiveTritonPeer(triton, images)
            try:
                yield peer
            finally:
                peer.close()
        finally:
            triton.stop()


def _write_repository(folder: Path, checkpoint: str) -> None:
    source = Path(str(files("captionserve_server.bench.peers.naive_triton")))
    (folder / _MODEL / "1").mkdir(parents=True)
    shutil.copy(source / "model.py", folder / _MODEL / "1" / "model.py")
    config = (source / "config.pbtxt").read_text()
    # A JSON string is a string of the configuration's language too.
    named = config.replace('"CHECKPOINT"', json.dumps(checkpoint))
    (folder / _MODEL / "config.pbtxt").write_text(named)
