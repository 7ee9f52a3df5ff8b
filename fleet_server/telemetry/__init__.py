"""Telemetry: stored once, summed up, read by rollouts and people."""
