"""Facts and files that all share."""
