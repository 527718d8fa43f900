"""How blocks and activations move; knows nothing of methods or of resuming."""
