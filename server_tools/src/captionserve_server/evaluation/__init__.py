"""How well a caption service describes scenes whose facts are known."""
