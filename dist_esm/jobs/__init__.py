"""One module for each job, and what they share."""
