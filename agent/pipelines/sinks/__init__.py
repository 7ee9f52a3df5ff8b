"""Where a pipeline's results go: one file a kind."""
