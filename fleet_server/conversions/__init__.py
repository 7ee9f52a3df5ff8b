"""Conversion jobs: from a version and a profile to a gated variant."""
