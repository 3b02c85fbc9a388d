"""ESM-2 on one device: a pack in, embeddings out. The only folder that names a device."""

NUMERICS = 2
"""Version of the numbers' bits.

Raise it with any change of the forward, the pooling, the kernels or the defaults that gives some protein
other bits under the same settings: a resume then refuses to add them to those of an older run.
"""
