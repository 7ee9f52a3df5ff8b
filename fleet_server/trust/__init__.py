"""Who is who in a fleet: the fleet's certificate authority, and what it issues."""
