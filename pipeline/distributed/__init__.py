"""Processes and devices: cluster, process group, strategy, signals."""
