"""How files are written, locked and sealed: the one way for every other room.

Imports `errors` alone.
"""
