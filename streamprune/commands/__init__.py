"""The work of all commands but `run`, `plan` and `verify`: one module or folder per command."""
