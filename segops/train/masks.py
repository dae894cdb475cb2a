"""What the masks of a data set hold: the pixels of each value, counted once and remembered.

So that masks which teach or score nothing are found before training, not in its results.
"""

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tqdm import tqdm

from ..text import printable
from .transforms import VOID

VALUES = {str(value): value for value in range(256)}  # as JSON has them


def count_values(dataset, reading):
    """Pixels of each value, as stored, in every mask: (len(dataset), 256) int64.

    Counts are remembered in $XDG_CACHE_HOME/segops (~/.cache/segops), for each mask by its path,
    size and time of change. Where that folder cannot be read or written, all masks are read again.

    Args:
        dataset: `ImagesWithMasks` that has masks.
        reading: text of all that decides, beside a mask's file, which values are read from it.

    Raises:
        ValueError: the first mask, in order, that cannot be read, or holds a value that is neither
            class nor void; as the item raises it.
    """
    store = _store(reading)
    known, unknown = _load(store), {}
    counts, wrong = np.zeros((len(dataset), 256), np.int64), dataset._table < 0
    for index, path in enumerate(dataset.masks):
        state, name = os.stat(path), os.path.abspath(path)
        stamp = [state.st_size, state.st_mtime_ns]
        if _is_entry(known.get(name), stamp):
            for value, pixels in known[name][1].items():
                counts[index, VALUES[value]] = pixels
        else:
            unknown[index] = name, stamp

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    results = pool.map(lambda index: Image.fromarray(dataset.values(index)).histogram(), unknown)
    hidden = rank_zero_only.rank > 0
    try:
        for index in tqdm(range(len(dataset)), "reading masks", unit="", delay=2, leave=False, disable=hidden):
            if index in unknown:
                name, stamp = unknown[index]
                counts[index] = next(results)
                values = np.flatnonzero(counts[index]).tolist()
                known[name] = [stamp, {str(value): int(counts[index, value]) for value in values}]
            if counts[index, wrong].any():
                dataset[index]  # raises
    finally:
        pool.shutdown(cancel_futures=True)
        if unknown:
            _save(store, known)
    return counts


def _store(reading):
    """The file that counts are remembered in; None where there is no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    digest = hashlib.sha256(reading.encode("utf-8", "surrogateescape")).hexdigest()
    return cache / "segops" / f"masks-{digest[:32]}.json"


def _load(store):
    """{path: [[size, time], {value: pixels}]}, entries not checked."""
    try:
        known = {} if store is None else json.loads(store.read_bytes())
    except (OSError, RecursionError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _is_entry(entry, stamp):
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and entry[0] == stamp
        and isinstance(entry[1], dict)
        and len(entry[1]) > 0
        and all(value in VALUES and type(pixels) is int and 0 < pixels < 2**48 for value, pixels in entry[1].items())
    )


def _save(store, known):
    if store is None:
        return
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(".part", store.name, store.parent)
        try:
            with open(descriptor, "w") as file:
                json.dump(known, file)
            os.replace(part, store)
        finally:
            Path(part).unlink(missing_ok=True)


def listed(names, most):
    """'a, b and 3 more'."""
    names = [printable(str(name)) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def occurring(dataset, counts):
    """The classes that masks with these counts hold, ascending."""
    return [index for index in np.unique(dataset._table[counts.any(0)]).tolist() if index != VOID]


def check_scored(dataset, rows, counts, which):
    """Refuses masks, those of rows, that are void everywhere. which: "training", ..."""
    counts = counts[rows]
    if occurring(dataset, counts):
        return
    values = np.flatnonzero(counts.any(0)).tolist()
    files = [dataset.masks[row] for row in rows]
    raise ValueError(f"every pixel of all {len(files)} {which} masks is void, of value {listed(values, 5)}: {listed(files, 3)}")


def check_values(dataset, counts, which):
    """Refuses masks of a folder that hold one class and void because of how their values were
    taken: white, 255, is void and not class 1; or void is the value of a class."""
    values, classes = np.flatnonzero(counts.any(0)).tolist(), occurring(dataset, counts)
    masks = f"all {len(dataset)} {which} masks, as {dataset.masks[0]}, hold"
    if values == [0, VOID] and dataset._table[0] == 0 and dataset._table[VOID] == VOID:
        raise ValueError(f"{masks} 0 and 255 alone, and 255 is void: data.options.values={{255: 1}} makes it class 1")
    lost = [value for value in values if value < dataset.num_classes and dataset._table[value] == VOID]
    if len(classes) == 1 and lost:
        raise ValueError(f"void is {lost[0]}, so that class {lost[0]} never occurs: {masks} class {classes[0]} and void alone")
