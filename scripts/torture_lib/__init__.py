"""What `scripts/torture` and its test are made of: the board, the workers, the run, the report."""
