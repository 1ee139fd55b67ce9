"""The core inside the trainers of others: `trl` for TRL, `verl` for verl; each needs its library.

May import `core`.
"""
