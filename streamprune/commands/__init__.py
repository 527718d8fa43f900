"""What the other commands do, one module or folder per command."""
