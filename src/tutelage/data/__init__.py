"""Prompts, tasks and rollouts: from records to batches of rows.

Imports `grading` and `errors`; only `batch` needs torch.
"""
