"""Starting and ending a whole service: an embedded Triton and the gateway in front of it."""
