"""Run lm-evaluation-harness on a streamed model, with the requests of all tasks scored in one sweep."""

from .tasks import Tasks, TaskScores, evaluate_tasks, find_tasks

__all__ = ["TaskScores", "Tasks", "evaluate_tasks", "find_tasks"]
