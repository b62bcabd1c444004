"""The pure core: options, decoding and scheduling on numpy arrays, with no I/O and no Triton."""
