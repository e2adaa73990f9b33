"""Ranks and balance of the attention products."""
