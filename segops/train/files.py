"""Files that are whole or not there, and checkpoints read without running what is in them."""

import os
import re
from pathlib import Path

from segops.models.checkpoints import read_file

from ..text import printable

PLAIN = (dict, list, tuple, bool, int, float, type(None))
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # a terminal obeys them, or cannot print them


def write_whole(path, write):
    """Calls write(file) on a file beside `path`, which then takes its place: whoever reads `path` finds
    the old or the new, on a full disk and after a kill too.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # it may be a link to a file elsewhere
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save closes its archive with the latter
        failed = error
        while failed is not None and not isinstance(failed, OSError):
            failed = failed.__context__
        if failed is None:
            raise
        raise OSError(failed.errno, f"{failed.strerror}; what was there before is whole", str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path, map_location="cpu"):
    """What torch.save wrote: tensors and plain values. Nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be read; says what it is.
            Both name it.
    """
    return read_file(path, "checkpoint", map_location)


def unfolded(value, most):
    """A value and all that containers within containers hold, each as often as it is met: a few
    shared ones may hold billions, or themselves.

    Raises:
        OverflowError: there are more than `most`.
    """
    stack, seen = [value], 0
    while stack:
        item = stack.pop()
        seen += 1
        if isinstance(item, dict):
            stack += [*dict.keys(item), *dict.values(item)]
        elif isinstance(item, list | tuple | set):
            stack += item
        if seen + len(stack) > most:
            raise OverflowError
        yield item


def unfolds_to_more(value, most=2**22):
    """Whether a value unfolds to more than so many."""
    try:
        for _ in unfolded(value, most):
            pass
    except OverflowError:
        return True
    return False


def is_plain(value, most=2**16):
    """Whether a value unfolds to at most so many dicts, lists, tuples, numbers and texts without
    control characters."""
    try:
        return all(
            len(item) <= 1000 and not CONTROL.search(item) if type(item) is str else type(item) in PLAIN
            for item in unfolded(value, most)
        )
    except OverflowError:
        return False


def first_line(error):
    """The first line of what an exception says, or the exception where it says nothing, for a
    terminal."""
    return printable((str(error).strip() or repr(error)).splitlines()[0])
