"""Photographs and labels of a data set -> records, samples in a cache, and splits that no eye straddles.

Leaves out: batches and augmentation (data.py).
"""
