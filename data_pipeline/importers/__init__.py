"""Import of chat logs of other tools, in JSON Lines, JSON arrays or Parquet, as trajectory files."""
