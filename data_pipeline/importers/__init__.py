"""Trajectories from elsewhere: chat logs of other tools, in JSON Lines, JSON arrays or Parquet, to our JSON Lines."""
