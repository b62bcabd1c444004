"""Bulk captioning on a real Ray, in an environment of its own: `make test-ray`."""
