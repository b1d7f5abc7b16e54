"""Decides, as pure data: who holds which blocks, in what order they move, what it costs."""
