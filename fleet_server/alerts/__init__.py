"""Alerts: rules over what the fleet says, what came of them, and who is told."""
