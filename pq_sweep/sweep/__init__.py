"""Many jobs: compose and check the grid, search, submit, run one, conclude."""
