"""Files that are whole or not there, and checkpoints read without running what is in them."""

import os
from pathlib import Path

from segops.models.checkpoints import read_file

from ..text import printable


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


def unfolds_to_more(value, most=2**22):
    """Whether containers within containers hold more items than that, each as often as it is met:
    a few shared ones may hold billions, or themselves."""
    stack, seen = [value], 0
    while stack:
        item = stack.pop()
        seen += 1
        if isinstance(item, dict):
            stack += [*dict.keys(item), *dict.values(item)]
        elif isinstance(item, list | tuple | set):
            stack += item
        if seen + len(stack) > most:
            return True
    return False


def first_line(error):
    """The first line of what an exception says, or the exception where it says nothing, for a
    terminal."""
    return printable((str(error).strip() or repr(error)).splitlines()[0])
