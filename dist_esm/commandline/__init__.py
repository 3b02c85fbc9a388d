"""The command line: its words, their mistakes, the ranks that it starts, and the job that it runs."""
