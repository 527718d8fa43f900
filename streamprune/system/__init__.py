"""Files, devices, threads, signals and processes. Nothing here knows about models."""
