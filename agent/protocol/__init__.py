"""The wire contract between agents and the fleet server: plain MQTT, msgspec messages.

The one part of the agent that `fleet_server` and `converters` may import; it imports nothing of the rest of the
agent. Everything that crosses the broker is defined here: versions, topics, messages, the manifest of an artifact,
the facts of a device, the phases of a deployment, the bounds on what is decoded, and the error codes.
See docs/protocol.md.
"""
