"""Real services that tests start for themselves and stop again."""
