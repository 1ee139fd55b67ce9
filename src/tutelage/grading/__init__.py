"""Whether two answers are the same mathematics; formulas are parsed in a process of their own.

May import `errors`.
"""
