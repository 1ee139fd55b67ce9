"""Student and teacher: loading, tokenizers, forward passes, optimizers; `llama_cpu` on a CPU only.

May import `core`, `grading`, `data`, `envs`, `files`, `config`, `errors`.
"""
