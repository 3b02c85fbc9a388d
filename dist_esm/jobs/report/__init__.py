"""What became of every file and record: the report as a file, as a page, and as the text at the end."""
