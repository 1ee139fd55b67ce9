"""What a run needs of main memory and of a GPU, before it starts.

Imports `setup` and what that may import.
"""
