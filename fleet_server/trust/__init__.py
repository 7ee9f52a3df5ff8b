"""Who is who in a fleet, and what its devices may run: the certificate authority, and the TUF repository."""
