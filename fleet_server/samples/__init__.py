"""Samples of what devices were asked: which are kept there, who asks for them, and what came of it."""
