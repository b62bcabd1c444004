from captionserve_server.triton.decoder_step import TritonPythonModel  # noqa: D100, F401
