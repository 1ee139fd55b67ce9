"""Sampling, grading, intervals: how good a model is on held-out prompts and benchmarks.

Imports `setup` and what that may import.
"""
