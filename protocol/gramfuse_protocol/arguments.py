"""Type checks for the arguments of public functions, so that mistakes fail early and clearly."""

from __future__ import annotations

from os import PathLike

from gramfuse_protocol.errors import ContributionError, GramfuseError
from gramfuse_protocol.text import quoted

VALUE_CHARACTERS = 60
"""Maximum length at which an error quotes a wrong value."""


def check_argument(
    name: str, value: object, kinds: type | tuple[type, ...], expected: str, error: type[GramfuseError]
) -> None:
    """Raise `error` unless an argument has one of the given types.

    Args:
        name: function and argument, for the message: `merge: layout`.
        expected: the expected type, in words.
        error: class of the error.
    """
    if not isinstance(value, kinds):
        raise wrong_argument(name, value, expected, error)


def check_path(name: str, value: object) -> None:
    """Raise ContributionError if an argument is not a path."""
    check_argument(name, value, (str, PathLike), "a path", ContributionError)


def check_contribution(name: str, value: object) -> None:
    """Raise ContributionError if an argument is not a `Contribution`."""
    if not hasattr(value, "block"):
        expected = "statistics, as collect_statistics and read_statistics return them"
        raise wrong_argument(name, value, expected, ContributionError)


def wrong_argument(name: str, value: object, expected: str, error: type[GramfuseError]) -> GramfuseError:
    """Return the error for an argument of the wrong type; arguments as in `check_argument`."""
    simple = value is None or isinstance(value, (bool, int, float, str))
    shown = quoted(value, VALUE_CHARACTERS) if simple else f"a {type(value).__name__}"
    return error(f"{name} is {shown}, expected {expected}")
