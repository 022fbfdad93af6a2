"""Everything that a reader may leave aside: what makes the seven files above trustworthy and fast.

Nothing in here imports them.
"""
