"""Which files, cut where, on which rank."""
