"""Why a checkpoint is not exported; here without PyTorch, which takes seconds to import."""

from __future__ import annotations


class UnsupportedCheckpointError(ValueError):
    """The checkpoint cannot be exported; the message names what it is and what is supported."""
