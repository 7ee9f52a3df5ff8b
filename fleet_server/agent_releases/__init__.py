"""Releases of the agent: bundles that devices become by themselves, pushed here and rolled out like versions."""
