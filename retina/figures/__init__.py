"""Pictures of a run, drawn with Pillow.

Leaves out: the command (visualize.py).
"""
