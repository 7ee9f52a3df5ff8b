"""What `agent.protocol.processing` declares, carried out on arrays: on devices, and where variants are measured."""
