"""Pages, pictures and tables from run folders; no model is loaded here.

Imports `evaluation.metrics`, `files` and `errors` alone.
"""
