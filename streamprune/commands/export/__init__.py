"""Export checkpoints to other runtimes' formats: GGUF, for llama.cpp and programs built on it."""
