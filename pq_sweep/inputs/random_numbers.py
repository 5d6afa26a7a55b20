"""Random numbers that a network draws when it answers: a benchmark must not measure a network of chance."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pq_sweep.core.dispatch import without_compiler
from pq_sweep.core.generators import left_alone
from pq_sweep.core.sentences import listed
from pq_sweep.inputs.passes import run
from pq_sweep.types import Model, UserError

# Every number that is drawn becomes each of these in turn: a network whose answers stay the same does not use them.
FORCED = (-10.0, 0.0, 1.0, 10.0)


@without_compiler
class Draws(TorchDispatchMode):
    """Notes each operation of a pass that draws random numbers, and the state of its generator before it.

    An operation that could draw and does not, such as attention without dropout, leaves its generator as it is.
    `forced` is put in place of every floating point number drawn.
    """

    supports_higher_order_operators = True

    def __init__(self, forced: float | None = None) -> None:
        super().__init__()
        self.forced = forced
        self.drawn: list[tuple[str, list[bytes]]] = []
        self.all_forced = True
        self.python_before = self.python = _python_states()

    def __exit__(self, *error: Any) -> None:
        """Look at the generators of Python and numpy as they stand after the pass."""
        self.python = _python_states()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compare the generators before and after an operation that may draw."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        own = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
        before = _states(own)
        result = func(*args, **kwargs)
        if moved := [state for state, now in zip(before, _states(own), strict=True) if state != now]:
            self.drawn.append((func.__name__.partition(".")[0].strip("_"), moved))
            if self.forced is not None:
                self._force(result)
        return result

    def _force(self, result: Any) -> None:
        for value in result if isinstance(result, tuple | list) else [result]:
            if value.is_floating_point():
                value.fill_(self.forced)
            else:
                self.all_forced = False

    def python_drew(self) -> bool:
        """Say whether Python's or numpy's generator moved since the pass began."""
        return self.python != self.python_before

    def names(self) -> list[str]:
        """Name what drew."""
        names = [name for name, _ in self.drawn] + ["random or numpy.random"] * self.python_drew()
        return list(dict.fromkeys(names))


def _states(own: list[torch.Generator]) -> list[bytes]:
    """Return the state of every generator of torch's, and of those given."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [one.get_state().numpy().tobytes() for one in (torch.default_generator, *cuda, *own)]


def _python_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False))


def judged(model: Model, draws: Draws, what: str) -> list[str]:
    """Refuse a network whose answers depend on the random numbers that a pass drew, or return a note on them.

    Numbers are the same each time if the network seeds their generator itself.
    """
    names = draws.names()
    if not names or _seeds_itself(model, what):
        return []
    if draws.python_drew() or not _ignored(model, what):
        raise UserError(
            f"{what} draws random numbers when it answers, even in eval mode ({listed(names)}), so that no two answers"
            " are alike; give dropout and noise training=self.training."
        )
    return [f"The network draws random numbers when it answers ({listed(names)}), on which its answers do not depend."]


def _seeds_itself(model: Model, what: str) -> bool:
    """Say whether all generators stand alike wherever a pass draws, and after it, however they stood before."""
    found, images = [], model.sample(2)
    for seed in (1, 2):
        with left_alone(seed), Draws() as draws:
            run(model, images, what)
        found.append((draws.drawn, draws.python if draws.python_drew() else None))
    return found[0] == found[1]


def _ignored(model: Model, what: str) -> bool:
    """Say whether the answers stay the same whatever is put in place of the numbers that are drawn."""
    answers, images = list[Tensor](), model.sample(2)
    for forced in (None, *FORCED):
        with left_alone(), Draws(forced) as draws:
            answers.append(run(model, images, what))
        if forced is not None and not draws.all_forced:
            return False
    return all(torch.equal(answer, answers[0]) for answer in answers)
