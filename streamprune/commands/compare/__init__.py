"""Compare recipes at several ratios in one table."""
