"""Data-parallel ESM-2 protein embeddings with torch.distributed."""
