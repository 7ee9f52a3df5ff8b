"""Rollouts and deployments: staged, judged, stopped and reverted."""
