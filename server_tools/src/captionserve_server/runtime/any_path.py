"""Folders of any name, for libraries that take text in UTF-8 only.

A name is bytes, which need not be UTF-8, and the libraries that read and write graphs and weights
refuse such a path. An open folder has another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def utf8_path(folder: Path) -> Iterator[Path]:
    """The folder under a path in UTF-8, for as long as the block lasts.

    Args:
        folder: where its path is no UTF-8, it must exist.

    Raises:
        OSError: if it cannot be opened.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield folder
