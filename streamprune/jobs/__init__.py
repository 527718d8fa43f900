"""What a job is asked, where it works, and what it will take."""
