"""Executes across ranks: transports, ring attention, distributed estimate, ContextParallel."""
