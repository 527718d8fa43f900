"""Files, devices, threads, signals, processes: nothing about models."""
