"""What a run shows while it is under way: a live view or lines, `progress.json`, and a record of samples."""
