"""Implementations of attention and of the rest of a block, and the choice between them."""
