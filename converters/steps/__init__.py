"""Conversion steps, one file each; what is heavy is imported inside the step that needs it."""
