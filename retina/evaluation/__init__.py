"""What answers are worth: measures, intervals, comparisons, what the experts do.

Leaves out: the command and what it prints (evaluate.py).
"""
