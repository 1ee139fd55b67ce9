"""Sampling, grading and intervals: accuracy on held-out prompts and benchmarks.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `teachers`, `setup`, `memory`,
`files`, `config`, `errors`, `tutelage`.
"""
