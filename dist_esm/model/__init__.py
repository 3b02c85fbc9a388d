"""ESM-2 on one device: a pack in, embeddings out. The only folder that names a device."""
