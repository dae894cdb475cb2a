"""A run's folder: checkpoints, written whole or not at all, and results."""

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from .files import is_plain, read_checkpoint, unfolds_to_more, write_whole
from .metrics import table

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None


@contextmanager
def locked(folder, leads=True):
    """Keeps other processes from training in a run's folder, until it ends or the process does.

    Args:
        leads: False on the ranks that need no lock, as the first has it.

    Raises:
        FileExistsError: another process has it. OSError: the folder cannot be written.
    """
    if fcntl is None or not leads:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # No link, lest a file elsewhere is written over.
    with open(
        folder / "lock", "r+", opener=lambda path, flags: os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    ) as file:
        try:
            # A record lock and no flock, which forked processes, as a loader's workers, would keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(
                f"process {file.read().strip() or '?'} trains in {folder}: wait until it ends, or name another folder with "
                "--trainer.default_root_dir"
            ) from None
        except OSError as error:  # of some network file systems
            rank_zero_warn(f"{folder} cannot be locked, so that nothing keeps a second fit out of it: {error}")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written whole and read with weights_only=True."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        write_whole(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path, map_location=lambda storage, place: storage, weights_only=True):
        saved = read_checkpoint(path, map_location)
        needed = ("pytorch-lightning_version", "state_dict", "segops")
        if not isinstance(saved, dict) or not all(key in saved for key in needed):
            raise ValueError(f"{path} is no checkpoint of segops fit: it needs the entries {', '.join(map(repr, needed))}")
        if not isinstance(saved[needed[0]], str) or unfolds_to_more(saved):
            raise ValueError(f"{path} is no checkpoint of segops fit: it is not as Lightning writes them")
        return saved

    def remove_checkpoint(self, path):
        # A resumed run's callbacks may take paths from the checkpoint, where ".." leads anywhere.
        if Path(path).is_file() and ".." not in Path(path).parts:
            super().remove_checkpoint(path)


class Last(Checkpoint):
    """Keeps checkpoints/last.ckpt: of the end of the last epoch and, with `every`, of the last step whose number it divides. Comes after `best`, whose state it
    saves: Lightning moves all of kind Checkpoint behind other callbacks, in their order.

    (ModelCheckpoint's own last.ckpt is left behind where the best does not change.)
    """

    def __init__(self, folder, every=None):
        super().__init__()
        self.path, self.every = last_checkpoint(folder), every

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.every is not None and trainer.fit_loop.epoch_loop.batch_progress.total.ready % self.every == 0:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


def last_checkpoint(folder):
    return Path(folder, "checkpoints", "last.ckpt")


def best_checkpoint(folder):
    return Path(folder, "checkpoints", "best.ckpt")


class Best(ModelCheckpoint):
    """Keeps checkpoints/best.ckpt: of the epoch with the largest `monitor`."""

    def __init__(self, folder, monitor):
        self.path = best_checkpoint(folder)
        super().__init__(self.path.parent, self.path.stem, monitor, mode="max", enable_version_counter=False)

    @property
    def state_key(self):
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state):
        """The score of the file that is in this folder, wherever the run was before: Lightning
        would forget it with the folder's name. Without the file there is no best yet."""
        score, own = state.get("best_model_score") if isinstance(state, dict) else None, str(Path(self.dirpath, self.path.name))
        if isinstance(score, torch.Tensor) and self.path.is_file():
            paths = {"dirpath": self.dirpath, "best_model_path": own, "kth_best_model_path": own}
            super().load_state_dict(paths | {"best_model_score": score, "kth_value": score, "best_k_models": {own: score}})


class Results(Callback):
    """results.json: every validation's figures, the last one's of every class, and the time it took; kept over a resumption, as part of the checkpoint."""

    def __init__(self, folder):
        self.path, self.history, self.seconds, self.since = Path(folder, "results.json"), [], 0.0, None

    def state_dict(self):
        return {"history": self.history, "seconds": self._elapsed()}

    def load_state_dict(self, state):
        history, seconds = (state.get(key) for key in ("history", "seconds")) if isinstance(state, dict) else (None, None)
        known = type(history) is list and all(type(epoch) is dict for epoch in history) and is_plain(history, 2**22)
        if not known or type(seconds) not in (int, float):
            raise ValueError("a resumed run's checkpoint must hold its results as segops fit writes them: epochs and seconds")
        self.history, self.seconds = history, seconds

    def on_train_start(self, trainer, module):
        self.since = time.monotonic()

    def _elapsed(self):
        return self.seconds + (0.0 if self.since is None else time.monotonic() - self.since)

    def on_validation_end(self, trainer, module):
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        figures = {name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name}
        self.history.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step} | figures)
        results = {"seconds": self._elapsed(), "epochs": self.history, "classes": list(trainer.datamodule.classes)}
        if hasattr(module, "per_class"):
            results["per_class"] = module.per_class
        text = json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n"
        write_whole(self.path, lambda file: file.write(text.encode()))


def without_nan(value):
    """What JSON can say: None where a figure is of nothing."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(trainer, module, split):
    """The figures of the last evaluation, as text."""
    prefix = f"{split}/"
    values = {
        name.removeprefix(prefix): value.item() for name, value in trainer.callback_metrics.items() if name.startswith(prefix)
    }
    lines = []
    if "iou_macro" in values:
        per_class = {name: torch.tensor(figures) for name, figures in module.per_class.items()}
        lines.append(table(values, per_class, trainer.datamodule.classes))
    lines += [f"{name} {value:.4f}" for name, value in values.items() if name.startswith(("top", "binary")) or "loss" in name]
    return "\n".join(lines)
