"""OutputTable to files and back. Starts no thread that outlives a call."""
