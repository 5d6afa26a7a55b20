"""Images that are to be apart: what calibrates or trains a network says nothing about how it does on new images."""

from __future__ import annotations

from collections.abc import Mapping

from pq_sweep.types import Split, UserError, hash_each

# Images of each part that are compared, evenly spread; more would take longer to decode than a job may wait.
COMPARED = {"evaluation": 1000, "calibration": 300, "train": 300}
FEW = 0.1  # of the images may be in both, as in data sets in which some images are there twice


def apart(parts: Mapping[str, Split | None], target: str) -> list[str]:
    """Refuse images to calibrate or train with that are to evaluate with too; say so if it is only a few."""
    known, notes = set(_marks(parts["evaluation"], "evaluation")), []
    for name in ("calibration", "train"):
        marks = _marks(parts.get(name), name)
        both = sum(mark in known for mark in marks)
        if both > FEW * len(marks):
            raise UserError(
                f"{target} gives images for {name} that are evaluation images too ({both} of {len(marks)} that were"
                " compared), so accuracy would be that on images which the network was made for; keep them apart."
            )
        if both:
            notes.append(f"Of {len(marks)} {name} images that were compared, {both} are evaluation images too.")
    return notes


def _marks(part: Split | None, name: str) -> list[str]:
    """Return what tells images by what they show."""
    if part is None or not len(part):
        return []
    step = max(1, len(part) // COMPARED["evaluation"])
    indices = list(range(0, len(part), step))[: COMPARED[name]]
    return list(part.marks(indices) if part.marks else hash_each(part.fetch, indices))
