"""Decoding many requests together: the scheduler, its thread, and the KV cache."""
