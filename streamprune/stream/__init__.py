"""Streaming: move blocks and activations through memory. Independent of recipes and of resuming."""
