"""Accuracy, latency, memory, size, layers, and the state of the device."""
