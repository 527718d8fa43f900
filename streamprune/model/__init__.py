"""Checkpoints and architectures. Only this package works with safetensors files and transformers' modules."""
