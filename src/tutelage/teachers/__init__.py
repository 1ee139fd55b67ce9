"""Teachers whose model is on a server: clients that give a batch's rows what it says of them.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `files`, `config`, `errors`.
"""
