"""Inference runtimes, one file each, behind `agent.runtimes.base.Runtime`."""
