"""From a configuration to models, tokenizers, task and objective that fit; nothing trains here.

May import `core`, `grading`, `data`, `envs`, `models`, `rollout`, `files`, `config`, `errors`,
`tutelage`.
"""
