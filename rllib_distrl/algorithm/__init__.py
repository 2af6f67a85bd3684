"""Algorithms and their configurations."""
