"""Pages, plots and tables from run folders, without models.

May import `evaluation.metrics`, `files`, `errors`.
"""
