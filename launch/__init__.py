"""Starts jobs: configuration, data, checkpoints, metrics, reports and the command line."""
