"""What can be configured, as frozen dataclasses, and how TOML becomes them; no torch.

May import `errors`.
"""
