"""The main job: survey, allocate, prune, correct, write."""
