"""The naive Triton model of naive_triton/, served by an embedded or installed Triton."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files as resources
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

from captionserve_server.bench.peers.system import CALL_SECONDS, Options, Peer, System, TokenIds
from captionserve_server.serving.installation import find_triton
from captionserve_server.serving.private_folder import PrivateFolder
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.serving.triton_process import TritonProcess

_MODEL = "naive"
_START_SECONDS = 300.0


class _NaiveTriton(System):
    """The model, asked by Triton's own client."""

    def __init__(self, client: InferenceServerClient) -> None:
        self._client = client

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """Caption a file; there are no streams."""
        inputs = []
        for name, value in (("IMAGE", files[0]), ("OPTIONS", json.dumps(options).encode())):
            inputs.append(InferInput(name, [1], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array([value], dtype=np.object_))
        answer = self._client.infer(_MODEL, inputs, client_timeout=CALL_SECONDS)
        return [tuple(answer.as_numpy("TOKEN_IDS").tolist())]


@contextmanager
def naive_triton_peer(checkpoint: str) -> Iterator[Peer]:
    """The model of a checkpoint on a Triton of its own, ended on leaving.

    Raises:
        TritonNotFoundError: if there is no tritonserver.
        TritonStartError: if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="captionserve-naive-") as folder:
        source = Path(str(resources("captionserve_server.bench.peers.naive_triton")))
        model = Path(folder, _MODEL)
        (model / "1").mkdir(parents=True)
        shutil.copy(source / "model.py", model / "1" / "model.py")
        config = (source / "config.pbtxt").read_text()
        # A JSON string is a string of the configuration's language too.
        named = config.replace('"CHECKPOINT"', json.dumps(checkpoint))
        (model / "config.pbtxt").write_text(named)
        installation, log = find_triton(), TritonLog(None)
        with closing(PrivateFolder(installation, Path(folder))) as served:
            triton = TritonProcess(installation, served, log, environment={})
            try:
                asyncio.run(triton.wait_ready(_START_SECONDS))
                with closing(InferenceServerClient(triton.addresses.grpc)) as client:
                    yield Peer(triton.pid, _NaiveTriton(client).run)
            finally:
                triton.kill()
