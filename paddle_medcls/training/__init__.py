"""Training, resuming, run directories and grids of runs."""
