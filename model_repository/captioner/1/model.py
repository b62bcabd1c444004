from captionserve_server.triton.captioner import TritonPythonModel  # noqa: D100, F401
