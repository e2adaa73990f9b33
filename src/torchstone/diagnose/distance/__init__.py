"""Heads that move to slow rotary dimensions as distance grows, and what happens without them."""
