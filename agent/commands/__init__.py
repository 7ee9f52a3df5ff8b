"""Commands of the server: what the device does at once when it is asked, and what it says of it."""
