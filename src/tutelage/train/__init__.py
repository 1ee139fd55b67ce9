"""The training loop: `loop` repeats `step`, whose gradients come from `update`.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `teachers`, `setup`, `memory`,
`evaluation`, `files`, `config`, `errors`, `tutelage`.
"""
