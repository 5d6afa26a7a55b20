"""What makes a model smaller or faster: pruners, channel removal, recovery after pruning, and quantizers."""
