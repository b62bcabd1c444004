from captionserve_server.triton.captioner_stream import TritonPythonModel  # noqa: D100, F401
