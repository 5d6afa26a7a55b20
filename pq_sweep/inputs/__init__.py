"""What a job is given: models, data sets and images."""
