"""Bytes of FASTA to checked proteins and their segments. Imports no torch."""
