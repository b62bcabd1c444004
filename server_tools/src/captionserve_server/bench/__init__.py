"""Speed, measured as a ratio against peers in the same run."""
