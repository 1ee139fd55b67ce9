"""What each command of the command line does: one file a command.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `teachers`, `setup`, `memory`,
`evaluation`, `train`, `report`, `files`, `config`, `errors`, `tutelage`.
"""
