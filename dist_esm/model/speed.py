"""How fast known devices are, from docs/figures.md: for estimates where nothing is measured."""

from __future__ import annotations

from typing import NamedTuple

from dist_esm.model.esm2 import Architecture

SOURCE = "docs/figures.md"
CPU_FLOPS = 50e9
"""Floating-point operations a second of one core in fp32: two cores of an AMD EPYC with AVX2 embed 1,350
tokens a second with the 35M model."""
SMALL_WIDTH = 640
"""D of the largest model that suits a CPU, 150M."""
SMALL_MODEL = "esm2_t12_35M_UR50D"
"""What is proposed for a CPU."""


class Figure(NamedTuple):
    """A speed that was measured, end to end."""

    device: str
    """Part of a GPU's name."""
    model: str
    tokens_per_second: int


FIGURES = (
    Figure("H100", "esm2_t33_650M_UR50D", 397_216),
    Figure("H100", "esm2_t36_3B_UR50D", 105_402),
)
"""In bf16 on one GPU, proteins of the lengths of UniRef90, with quack-kernels."""


def known_figures(model: str, device_name: str = "") -> list[Figure]:
    """Return the figures for a model, of one device by its name or of all that were measured."""
    return [
        figure
        for figure in FIGURES
        if figure.model == model and (figure.device in device_name or not device_name)
    ]


def flops_of(arch: Architecture, num_layers: int, tokens: float, squares: float) -> float:
    """Return the floating-point operations of a forward through so many layers.

    Parameters
    ----------
    arch
        Of the model.
    num_layers
        Layers that are computed.
    tokens, squares
        Sums over what each forward sees, of its length and of its squared length.
    """
    return num_layers * (24 * arch.embed_dim**2 * tokens + 4 * arch.embed_dim * squares)
