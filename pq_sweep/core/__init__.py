"""What every room uses: facts on hardware and versions, files and folders, the cache, and what a result holds."""
