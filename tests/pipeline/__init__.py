"""The pipeline drop-in beside transformers 4.57's own."""
