"""Refuses arguments of the wrong type where other programs call in, before they fail far inside."""

from __future__ import annotations

from os import PathLike

from gramfuse_protocol.errors import ContributionError, GramfuseError
from gramfuse_protocol.text import quoted

MOST = 60
"""Characters that are shown of a wrong value."""


def check_argument(
    name: str, value: object, kinds: type | tuple[type, ...], expected: str, error: type[GramfuseError]
) -> None:
    """Raise an error unless an argument is of one of some types.

    Args:
        name: of function and argument, for the error, `merge: layout`.
        expected: what it must be, in words.
        error: what is raised.
    """
    if not isinstance(value, kinds):
        raise wrong_argument(name, value, expected, error)


def check_path(name: str, value: object) -> None:
    """Raise ContributionError if an argument is no path of a file."""
    check_argument(name, value, (str, PathLike), "the path of a file", ContributionError)


def check_contribution(name: str, value: object) -> None:
    """Raise ContributionError if an argument is no statistics (of type `Contribution`)."""
    if not hasattr(value, "block"):
        expected = "statistics, as collect_statistics and read_statistics return them"
        raise wrong_argument(name, value, expected, ContributionError)


def wrong_argument(name: str, value: object, expected: str, error: type[GramfuseError]) -> GramfuseError:
    """Return the error for an argument that is not what it must be; arguments as `check_argument` has them."""
    simple = value is None or isinstance(value, (bool, int, float, str))
    return error(f"{name} is {quoted(value, MOST) if simple else f'a {type(value).__name__}'}, expected {expected}")
