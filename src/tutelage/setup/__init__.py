"""From a configuration to models, tokenizers, task and objective that fit; nothing trains here.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `teachers`, `files`, `config`,
`errors`, `tutelage`.
"""
