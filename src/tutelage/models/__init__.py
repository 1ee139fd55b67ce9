"""Student and teacher: loading, tokenizers, forward passes, optimizers.

Imports `data`, `core`, `config`, `files` and `errors`. `llama_cpu` may
be skipped by all who have a GPU.
"""
