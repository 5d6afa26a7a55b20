"""What a job found, and when to believe it."""

from __future__ import annotations

# Cores kept busy by other processes from which on latency is called disturbed.
NOISY_LOAD = 0.2
