"""Whether two answers are the same mathematics, without training or models.

Imports `errors` alone; parsers of formulas run in a process of their own (`_worker`).
"""
