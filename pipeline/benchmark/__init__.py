"""Throughput of a config, and the comparison with plain Keras."""
