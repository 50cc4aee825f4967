"""Evaluation of trained networks: metrics, statistics, calibration, comparison and prediction."""
