"""The stages of a run in one work directory, each resumable."""
