"""Trains the weights of the embedded model: `make weights`.

With seed 0, deterministic algorithms and one thread, the same torch on the same kind of CPU gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from pq_sweep.compress.recovery import finetune
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.types import Model, Preprocess


def train(epochs: int = 20, seed: int = 0) -> DigitsCNN:
    """Train on the training split of the digits with AdamW and a one-cycle schedule (about 8 s on one core)."""
    torch.manual_seed(seed)
    model = Model(DigitsCNN(), 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
    finetune(model, digits(model), epochs=epochs, lr=0.01)
    return model.module.eval()  # type: ignore[return-value]


def main() -> None:
    """Train and save the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="safetensors file to write")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    save_file(train().state_dict(), parser.parse_args().output)


if __name__ == "__main__":
    main()
