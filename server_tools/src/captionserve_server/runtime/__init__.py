"""Running exported graphs with ONNX Runtime."""
