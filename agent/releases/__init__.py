"""The agent's own releases: fetched and verified like artifacts, unpacked side by side, tried by `agent.launcher`."""
