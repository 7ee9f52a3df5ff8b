"""Converters: functions from (model, profile, data) to a variant. No server, no database."""
