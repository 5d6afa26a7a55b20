"""One job, from its config to its `result.json`."""
