from captionserve_server.triton.decoder import TritonPythonModel  # noqa: D100, F401
