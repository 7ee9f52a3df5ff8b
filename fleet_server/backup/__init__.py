"""Backups: a server's database, artifacts and secrets in one folder, and a server out of them."""
