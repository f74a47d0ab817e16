"""Statistics, and reward models judged on labelled trajectories."""
