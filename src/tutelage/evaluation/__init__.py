"""Sampling, grading and intervals: accuracy on held-out prompts and benchmarks.

May import `core`, `grading`, `data`, `models`, `rollout`, `setup`, `memory`, `files`, `config`,
`errors`, `tutelage`.
"""
