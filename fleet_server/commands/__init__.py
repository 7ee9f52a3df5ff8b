"""Commands to devices: what somebody asks them to do at once, and what came of it."""
