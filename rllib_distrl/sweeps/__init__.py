"""Searches over the settings of a recipe, on Ray Tune."""
