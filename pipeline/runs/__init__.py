"""Run directories and where a run came from."""
