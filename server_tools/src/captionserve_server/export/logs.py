"""Keeping transformers' and the ONNX exporter's own chatter out of ours."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Let only errors of the libraries through; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # It warns of each attempt to reach the hub.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # onnxruntime's quantisers tell the root logger what they do with every node.
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
