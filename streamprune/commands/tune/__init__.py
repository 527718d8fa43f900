"""Low-rank recovery of a checkpoint."""
