#!/usr/bin/env python3
"""Write a checkpoint of random weights that are as hard to round as the real ones, in fair-esm's format.

    scripts/hard_weights.py esm2_t33_650M_UR50D hard.pt
    python -m dist_esm job=selfcheck input=proteins.fasta output_dir=check model=esm2_t33_650M_UR50D
        model.weights=hard.pt dtype=fp8

Attention is peaky, some channels are outliers, one carries nine tenths of every vector's squared length: see
`harden` in tests/helpers/checkpoints.py. The numbers of 3B take 12 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from dist_esm.config import model_config
from dist_esm.model.weights import architecture
from helpers.checkpoints import random_state, write_checkpoint


def main() -> int:
    """Draw the weights and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name of an ESM-2 model")
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arch = architecture(model_config(options.model))
    write_checkpoint(options.path, arch, random_state(arch, options.seed, hard=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
