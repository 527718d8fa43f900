"""lm-evaluation-harness on a streamed model: its tasks, its model's interface, and the scores of many sequences in one sweep."""

from .tasks import Tasks, TaskScores, evaluate_tasks, find_tasks

__all__ = ["TaskScores", "Tasks", "evaluate_tasks", "find_tasks"]
