"""The device side of the server: MQTT in and out, the broker, the chunk streamer."""
