"""Environments that an agent acts in: tools, worlds, tasks, and the scores of conversations.

May import `core`, `grading`, `data`, `files`, `config`, `errors`.
"""
