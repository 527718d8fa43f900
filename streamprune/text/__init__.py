"""From files and datasets to windows of tokens."""
