"""What a job will hold, read and compute, before it begins."""
