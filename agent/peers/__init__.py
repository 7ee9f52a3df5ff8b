"""Artifacts for other devices of the LAN: served by HTTP with ranges, found by mDNS."""
