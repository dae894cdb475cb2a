"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(path, write):
    """Calls write(file) on a file beside `path`, which then takes its place: whoever reads `path` finds the old or the new, on a full disk and after a
    kill too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
