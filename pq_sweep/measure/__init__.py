"""What is measured of a model: accuracy, latency, memory, size and layers, and the state of the device meanwhile."""
