"""Run directories and the provenance of runs."""
