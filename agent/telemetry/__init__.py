"""What the device measures of itself and its models, kept on disk until the server has it."""
