"""The typed gRPC service in front of Triton."""
