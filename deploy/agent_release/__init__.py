"""Bundles of the agent's own releases."""
