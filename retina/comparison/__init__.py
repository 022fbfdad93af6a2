"""The runs of a comparison, what their numbers are worth, and the report.

Leaves out: the rows and the command (baselines.py).
"""
