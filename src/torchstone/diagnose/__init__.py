"""Analyses that look inside models."""
