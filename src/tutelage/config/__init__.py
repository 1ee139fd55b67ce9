"""What can be configured: tables of the TOML file as frozen dataclasses, and how text becomes them.

Imports `errors` alone, and no torch.
"""
