"""Many simulated devices in one process: they speak the real protocol over a real broker to a real fleet server.

What a device decides is the agent's own code (the pure parts of `agent.update`: updater, probation, download); what it
measures is drawn from a file of behaviours. Nothing here knows the server's database or its services.
"""
