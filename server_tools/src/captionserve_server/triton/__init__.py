"""What runs inside Triton: the Python models, thin edges over the pure core."""
