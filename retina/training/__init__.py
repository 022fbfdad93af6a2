"""What protects, resumes and speeds up a run.

Leaves out: losses, the step and the loop (train.py).
"""
