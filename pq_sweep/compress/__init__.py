"""Prune, recover, quantize."""
