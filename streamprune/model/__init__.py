"""Checkpoints and architectures: the only floor that knows safetensors and transformers' modules."""
