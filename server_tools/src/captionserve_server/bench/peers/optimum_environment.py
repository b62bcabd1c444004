"""A virtual environment for optimum, which wants another transformers than we do.

The environment lies on top of ours: what optimum and we can share is shared, above all PyTorch and
ONNX Runtime, so that the comparison is of the programs and not of their libraries' versions, and
nothing large is installed twice.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from captionserve_server.bench.peers.worker import PeerError

# The last releases that go together.
REQUIREMENTS = ("optimum-onnx[onnxruntime]==0.1.0", "optimum==2.1.0", "transformers==4.57.6")
_ERROR_CHARACTERS = 2000
_EXPORT = """
import sys
from optimum.onnxruntime import ORTModelForVision2Seq
ORTModelForVision2Seq.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""


def optimum_python(environment: Path) -> str:
    """The Python of optimum's environment, which is made when it is not there.

    Raises:
        PeerError: if that fails, such as without a package index.
    """
    python, made_of = environment / "bin" / "python", environment / "made-of"
    wanted = "\n".join([sysconfig.get_path("purelib"), *_shared(), *REQUIREMENTS])
    if not made_of.exists() or made_of.read_text() != wanted:
        _run([sys.executable, "-m", "venv", "--clear", str(environment)])
        _lay_on_top_of_ours(str(python))
        _run([str(python), "-m", "pip", "install", "--quiet", *_shared(), *REQUIREMENTS])
        made_of.write_text(wanted)
    return str(python)


def _lay_on_top_of_ours(python: str) -> None:
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(_run([python, "-c", question]).strip())
    (own / "on_top_of.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _shared() -> list[str]:
    """What pip must not replace: our versions of the large libraries, as requirements."""
    return [f"{name}=={version(name)}" for name in ("torch", "onnxruntime", "numpy")]


def export_model(python: str, checkpoint: str, folder: Path) -> None:
    """Have optimum export the checkpoint's graphs into a folder.

    Raises:
        PeerError: if optimum fails.
    """
    _run([python, "-c", _EXPORT, checkpoint, str(folder)])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name} failed\n{done.stderr[-_ERROR_CHARACTERS:]}")
    return done.stdout
