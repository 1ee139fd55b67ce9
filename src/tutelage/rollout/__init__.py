"""The student samples: engines, requests, and one token after the other.

Imports `models` and what that may import. `cuda` holds the captured decoding step of a GPU.
"""
