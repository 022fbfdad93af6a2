"""Answers in the pixels of a photograph's own file.

Leaves out: measures; labels are read only to score masks at full size.
"""
