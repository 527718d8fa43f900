"""Forecast of a job's memory, disk, reads and FLOPs, before the job starts."""
