"""From a configuration to models, tokenizers and a task that fit each other, or one clear line.

Imports `rollout` and what that may import. Nothing here trains.
"""
