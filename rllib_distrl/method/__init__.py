"""Plug-in points between rewards and the loss: pure functions chosen by name."""
