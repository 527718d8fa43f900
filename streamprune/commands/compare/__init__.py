"""Recipes × ratios in one table."""
