"""Answers in the pixels of a photograph's own file.

Leaves out: labels; nothing here needs any.
"""
