"""What job folders say: read, watch, compare, decide, draw."""
