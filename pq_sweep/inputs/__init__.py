"""What a job works on: models with their weights, data sets with their images, and the downloads of both."""
