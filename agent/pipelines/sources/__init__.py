"""Where a pipeline's items come from: one file a kind."""
