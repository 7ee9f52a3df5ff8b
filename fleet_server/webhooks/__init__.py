"""Webhooks: events told by HTTP."""
