"""How much main memory and GPU memory each phase of a run needs, planned before it starts.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `teachers`, `setup`, `files`,
`config`, `errors`, `tutelage`.
"""
