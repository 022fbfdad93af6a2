"""The runs of a comparison, what their numbers are worth, and the report.

Leaves out: the configurations and the command (baselines.py).
"""
