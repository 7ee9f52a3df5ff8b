"""What a rollout does and why: pure. No database, no network, no clock but the one that is passed in."""
