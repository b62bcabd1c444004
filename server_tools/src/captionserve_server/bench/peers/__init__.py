"""The systems that are measured, each started, driven and ended in the same way."""
