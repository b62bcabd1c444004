"""From a Hugging Face checkpoint to a complete, checked Triton model repository."""
