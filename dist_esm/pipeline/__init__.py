"""One rank's work. Every thread and queue of the package is here."""
