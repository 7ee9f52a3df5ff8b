"""Bringing the device to its desired state: updater, download, store, journal."""
