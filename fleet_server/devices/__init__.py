"""Devices and the profiles they match."""
