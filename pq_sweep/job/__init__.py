"""One job, from its config to its `result.json`: checks, stages, reference, repeats, and going on after a stop."""
