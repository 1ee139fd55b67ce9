"""Student and teacher: loading, tokenizers, forward passes, optimizers.

`chat` has templates and calls of tools; `llama_cpu` is for a CPU only.

May import `core`, `grading`, `data`, `envs`, `files`, `config`, `errors`.
"""
