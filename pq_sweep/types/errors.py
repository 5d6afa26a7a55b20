"""What ends a job, and a choice that is refused; importing it imports nothing."""

from __future__ import annotations


class UserError(ValueError):
    """What was asked for cannot be done; the message is one sentence that says what would be right."""


class Stopped(BaseException):
    """SIGTERM came: scancel, preemption, or a machine that shuts down. No `except Exception` may swallow it."""


def choose(name: str, value: str, valid: tuple[str, ...]) -> str:
    """Return `value` if it is one of `valid`, else raise a UserError that lists them."""
    if value not in valid:
        raise UserError(f"{name}={value} is not known; valid are: {', '.join(valid)}.")
    return value
