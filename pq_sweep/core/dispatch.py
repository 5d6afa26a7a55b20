"""Looks at each operation of a pass without importing torch's compiler, which takes a job two seconds."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def without_compiler(mode: type[TorchDispatchMode]) -> type[TorchDispatchMode]:
    """Let a mode look at operations itself as long as nothing has imported torch's compiler.

    torch wraps what a mode does so that the compiler leaves it alone, and imports the compiler for that at the first
    operation. Where nothing is compiled there is nothing to leave alone. A mode that is not wrapped stays as it is.
    """
    guarded: Any = mode.__torch_dispatch__
    bare = getattr(guarded, "__wrapped__", None)
    if bare is None:
        return mode

    @wraps(bare)
    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (guarded if "torch._dynamo" in sys.modules else bare)(self, *args, **kwargs)

    del look.__wrapped__  # so that a mode is changed once
    mode.__torch_dispatch__ = look  # type: ignore[method-assign]
    return mode
