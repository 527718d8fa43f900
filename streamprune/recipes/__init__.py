"""Recipes: which units to remove and how to refit the remaining weights. They see tensors only: no files, no models."""
