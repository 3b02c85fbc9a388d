"""Weights as people have them: each kind of file is read into a `Checkpoint`, by fair-esm's names.

``files`` knows the bytes, ``names`` the names that other writers give to tensors, ``hub`` Hugging Face's
cache, ``adapter`` what peft writes, and ``checkpoint`` puts them together.
"""
