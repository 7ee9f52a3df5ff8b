"""Requests that are answered in another device's place: given to peers of the LAN, and taken from them."""
