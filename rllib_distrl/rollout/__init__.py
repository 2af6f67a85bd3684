"""Env runners that generate whole completions, and the fleet of remote ones."""
