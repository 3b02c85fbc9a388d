"""One module for each output format, behind one registry."""
