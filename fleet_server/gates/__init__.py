"""Gate runs: candidates of a variant measured on devices of its profile, and judged by that."""
