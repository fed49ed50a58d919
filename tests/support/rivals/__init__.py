"""Slow renderings of published methods in plain NumPy and PyTorch, written from their official code for the tests."""
