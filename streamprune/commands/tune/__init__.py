"""Recover a pruned checkpoint by low-rank training."""
