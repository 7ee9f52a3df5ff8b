"""Control plane of Shoal: REST API, device gateway, rollouts, conversions, and the `shoal` command."""
