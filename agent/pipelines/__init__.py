"""Pipelines that are declared in the configuration: a source, a model of this device, and sinks for its answers."""
