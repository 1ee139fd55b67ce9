"""Engines that sample completions from the student; `cuda` has the captured decoding step.

May import `core`, `grading`, `data`, `envs`, `models`, `files`, `config`, `errors`.
"""
