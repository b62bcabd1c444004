"""Running exported graphs: with ONNX Runtime, or with PyTorch where they are TorchScript."""
