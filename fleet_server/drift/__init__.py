"""Drift to look at: a version beside what it was like at first, and how far models on devices have moved."""
