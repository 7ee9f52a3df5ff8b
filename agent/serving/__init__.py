"""Local inference: the API other programs on the device call, micro-batching, hot swap."""
