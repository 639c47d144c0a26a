"""Names the rows of a batch that a model cannot compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gramfuse_client.data.batches import Encoded
from gramfuse_protocol.contract.task import Task
from gramfuse_protocol.errors import GramfuseError, ModelError
from gramfuse_protocol.text import one_line

MOST_ROWS = 64
"""Maximum number of rows that an error names."""


@contextmanager
def naming_rows(
    names: tuple[str, str], encoded: Encoded, order: Sequence[int], size: int
) -> Iterator[Callable[[int], int]]:
    """Turn an error of a model into one that names the rows of its batch; errors of gramfuse stay as they are.

    Args:
        names: names of the model and the data.
        encoded: the examples.
        order: of the examples in batches (`gramfuse_client.data.batches.batch_order`).
        size: examples in a batch.

    Yields:
        A function that takes the number of batches that are done, and returns it.

    Raises:
        ModelError: naming the rows.
    """
    count = 0

    def done(batches: int) -> int:
        nonlocal count
        count = batches
        return batches

    try:
        yield done
    except GramfuseError:
        raise
    except Exception as error:  # models can raise anything
        numbers = encoded.examples.numbers
        rows = sorted(numbers[i] for i in order[count * size : (count + 1) * size]) if numbers else []
        raise ModelError(
            f"model {names[0]!r} cannot compute a batch of {names[1]}, {_list_rows(rows)}: {type(error).__name__}: "
            f"{one_line(str(error), 1000)}. {_remedy(encoded.task)}; use --batch-size 1 to find the row that fails"
        ) from error


def _remedy(task: Task) -> str:
    """Return what to try if a model cannot compute a batch."""
    if task.task == "image-classification":
        return "The device may have too little memory: try another --batch-size"
    return (
        "The texts may be too long for it, or the device may have too little memory: try another --max-length or "
        "--batch-size"
    )


def _list_rows(rows: Sequence[int]) -> str:
    """List row numbers, at most MOST_ROWS."""
    more = f" and {len(rows) - MOST_ROWS:,} more" if len(rows) > MOST_ROWS else ""
    return f"row {', '.join(map(str, rows[:MOST_ROWS]))}{more}"
