from captionserve_server.triton.preprocess import TritonPythonModel  # noqa: D100, F401
