"""The systems that are measured: how each is started, driven and ended."""
