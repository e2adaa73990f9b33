"""Measurements of what models can do."""
