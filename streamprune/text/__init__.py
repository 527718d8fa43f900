"""Calibration and evaluation text: read files and datasets, and cut them into windows of tokens."""
