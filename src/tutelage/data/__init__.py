"""Prompts, tasks and rollouts: from records of files to batches of rows; only `batch` needs torch.

May import `core`, `grading`, `files`, `config`, `errors`.
"""
