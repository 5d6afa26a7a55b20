"""How fast do images come? `python -m benchmarks.data_path FOLDER` prints images per second of each way as Markdown.

FOLDER has a folder of photographs per class. The ways are `Split.batches` from the warm cache, the same from JPEG with
an empty cache, and torchvision's ImageFolder with a DataLoader of 0 and 2 workers, all with the same transform. Every
round measures each way once, from asking for the first batch to the last one on the device, and starts with another
way. A DataLoader's workers start anew in each round, as they do in each epoch. All files are read once before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from pq_sweep.core.environment import device_name, versions
from pq_sweep.inputs.classes import stratified_order
from pq_sweep.inputs.image_cache import ImageCache
from pq_sweep.inputs.images import Labelled, find_images, readable, split_of
from pq_sweep.types import Preprocess

PREPROCESS = Preprocess()
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Way = Callable[[], contextlib.AbstractContextManager[Batches]]


def main() -> None:
    """Measure the ways in turn and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_path", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a folder of class folders of photographs")
    parser.add_argument("--images", type=int, default=256, help="how many, of all classes alike")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = find_images(options.folder)[0]
    chosen = [found[i] for i in stratified_order([label for _, label in found], seed=0)[: options.images]]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PQ_SWEEP_CACHE"] = scratch
        ways = ways_of(options.folder, chosen, options.batch_size, options.device)
        first = {name: take_all(way, options.device)[1] for name, way in ways.items()}
        rates = measured(ways, options.rounds, options.device)
    print(table(rates, options, len(chosen)))
    same = all(torch.equal(images, first["Split.batches, warm cache"]) for images in first.values())
    print(f"\nThe first batch of all ways is {'the same to the bit' if same else '**not the same**'}.")


def ways_of(folder: Path, chosen: Labelled, size: int, device: str) -> dict[str, Way]:
    """Return each way of getting the chosen images, by name."""
    return {
        "Split.batches, warm cache": partial(from_cache, folder, chosen, size, device),
        "Split.batches, JPEG and empty cache": partial(from_files, folder, chosen, size, device),
        "ImageFolder, DataLoader of 0 workers": partial(from_loader, folder, chosen, size, device, 0),
        "ImageFolder, DataLoader of 2 workers": partial(from_loader, folder, chosen, size, device, 2),
    }


@contextlib.contextmanager
def from_cache(folder: Path, chosen: Labelled, size: int, device: str) -> Iterator[Batches]:
    """Read images that are already decoded, as the second job and all later ones do."""
    cache = ImageCache(folder, PREPROCESS)
    yield split_of(cache, readable(cache, chosen)).batches(size, device)


@contextlib.contextmanager
def from_files(folder: Path, chosen: Labelled, size: int, device: str) -> Iterator[Batches]:
    """Decode all images and read them, as the first job does."""

    def batches() -> Batches:
        cache = ImageCache(folder, PREPROCESS)
        yield from split_of(cache, readable(cache, chosen)).batches(size, device)

    warm = os.environ["PQ_SWEEP_CACHE"]
    with tempfile.TemporaryDirectory() as empty:
        os.environ["PQ_SWEEP_CACHE"] = empty
        try:
            yield batches()
        finally:
            os.environ["PQ_SWEEP_CACHE"] = warm


@contextlib.contextmanager
def from_loader(folder: Path, chosen: Labelled, size: int, device: str, workers: int) -> Iterator[Batches]:
    """Decode all images by torchvision's own parts."""
    steps = [T.Resize(PREPROCESS.resize, T.InterpolationMode(PREPROCESS.interpolation)), T.CenterCrop(PREPROCESS.size)]
    dataset = ImageFolder(str(folder), T.Compose([*steps, T.ToTensor(), T.Normalize(PREPROCESS.mean, PREPROCESS.std)]))
    places = {path: index for index, (path, _) in enumerate(dataset.samples)}
    subset = Subset(dataset, [places[str(path)] for path, _ in chosen])
    loader: Any = DataLoader(subset, size, num_workers=workers, pin_memory=device != "cpu")
    yield ((images.to(device, non_blocking=True), labels.to(device)) for images, labels in loader)


def take_all(way: Way, device: str) -> tuple[float, torch.Tensor]:
    """Return the seconds until all batches were there, and the first of them."""
    with way() as batches:
        start = time.perf_counter()
        rest = iter(batches)
        first = next(islice(rest, 1))[0]
        for _ in rest:
            pass
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, first.cpu()


def measured(ways: dict[str, Way], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each way, round by round; every round starts with another way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(take_all(ways[name], device)[0])
    return seconds


def table(seconds: dict[str, list[float]], options: argparse.Namespace, images: int) -> str:
    """Draw images per second as Markdown, and the speed-up over the last way, round by round."""
    about = f"{images} images in batches of {options.batch_size}, {options.rounds} rounds, to {options.device}"
    cores = f"{device_name('cpu')}, {len(os.sched_getaffinity(0))} cores"
    lines = [f"{about}; {cores}, torch {versions()['torch']}, {torch.get_num_threads()} threads.", ""]
    lines += [
        "| way | images/s, median | smallest | largest | times the DataLoader of 2 |",
        "|---|---:|---:|---:|---:|",
    ]
    reference = list(seconds.values())[-1]
    for name, taken in seconds.items():
        rates = [images / one for one in taken]
        ratio = statistics.median(other / own for own, other in zip(taken, reference, strict=True))
        cells = [*(f"{rate:,.0f}" for rate in (statistics.median(rates), min(rates), max(rates))), f"{ratio:.2f}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
