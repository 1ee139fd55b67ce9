"""Completions that are stored in the run folder before the steps that learn from them."""
