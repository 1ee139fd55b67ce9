"""Writing files atomically, locking folders, checksums: the one way for every other room.

May import `errors`.
"""
