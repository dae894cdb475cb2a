"""timm's models with weights: timm's own, from the cache or the network, or those of a file."""

import difflib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, get_session

from .model import misfit, shown


def check_timm(name):
    known = isinstance(name, str) and timm.is_model(name)
    near = [] if known else difflib.get_close_matches(str(name), timm.list_models(), n=5)
    if known:
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:  # no such weights, as resnet50.tag names them
            known, near = False, timm.list_pretrained(f"{name.split('.')[0]}.*")
    if not known:
        raise ValueError(f"backbone must be a timm model; got {name!r}; near matches: {', '.join(near) or 'none'}")


def create_timm(name, pretrained=False, **arguments):
    """timm.create_model, whose weights are those of the cache, network or not, else fetched; where
    they cannot be, an error says so at once.

    Args:
        name: of a timm model.
        pretrained: False (default) for no weights, True for timm's own, or a classifier's
            state_dict, which `check_classifier` has seen.
        arguments: of timm.create_model.

    Raises:
        ValueError: timm does not know the name, or has no weights of it (says of what it has). OSError: they cannot be fetched.
        TypeError: another `pretrained`.
    """
    check_timm(name)
    if isinstance(pretrained, bool):
        overlay = _weights_of(name) if pretrained else None
    elif isinstance(pretrained, dict):
        overlay = {"state_dict": pretrained, "num_classes": -1}  # unlike any: its layer of classes is dropped
    else:
        raise TypeError(f"pretrained must be True, False or a state_dict for timm's {name}; got {pretrained!r}")
    return timm.create_model(name, pretrained=pretrained is not False, pretrained_cfg_overlay=overlay, **arguments)


def _weights_of(name):
    """What tells timm where its own weights of a model are: in a file."""
    with torch.device("meta"):
        config = timm.create_model(name).pretrained_cfg  # also of a model that users register
    if config.get("file") or config.get("state_dict"):
        return None
    repository, url = config.get("hf_hub_id"), config.get("url")
    if not repository and not url:
        able = timm.list_pretrained(f"{name.split('.')[0]}.*") or difflib.get_close_matches(name, timm.list_pretrained(), n=5)
        raise ValueError(
            f"pretrained must be False or a file for {name!r}, of which timm has no weights; it has "
            f"{', '.join(able) or 'none like it'}"
        )
    host = urlparse(huggingface_hub.constants.ENDPOINT if repository else url).netloc
    state = "which cannot be reached"
    try:
        cached, ask, fetch = _hub(repository) if repository else _web(url)
        if cached is None:
            _answered(ask)
            state = "which does not deliver them"
            cached = fetch()
    except Exception as error:  # of the HTTP client, the hub's or the disk
        error = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason = (str(error).strip() or "no answer").splitlines()[0][:120]
        beforehand = f"hf download {repository}" if repository else f"{url} in {_web_folder()}"
        raise OSError(
            f"pretrained=True needs the weights of timm's {name} from {host}, {state} "
            f"({type(error).__name__}: {reason}); instead: pretrained: false "
            "(--model.options.pretrained false), a file (pretrained: PATH), or the weights in the cache "
            f"beforehand ({beforehand})"
        ) from None
    return {"file": str(cached), "custom_load": not repository and config.get("custom_load", False)}


def _hub(repository):
    """Of a repository on the hub: the cached file of weights or None, a request that tells whether
    there is a network, and what fetches."""
    repository, _, revision = repository.partition("@")
    at = {"repo_id": repository, "revision": revision or None}
    names = ("model.safetensors", "pytorch_model.bin")
    found = [huggingface_hub.try_to_load_from_cache(filename=name, **at) for name in names]
    cached = next((file for file in found if isinstance(file, str)), None)

    def ask():
        get_session().head(huggingface_hub.hf_hub_url(filename=names[0], **at), timeout=_wait())

    def fetch():
        try:
            return huggingface_hub.hf_hub_download(filename=names[0], **at)
        except LocalEntryNotFoundError:  # the network, not the repository
            raise
        except EntryNotFoundError:
            return huggingface_hub.hf_hub_download(filename=names[1], **at)

    return cached, ask, fetch


def _web(url):
    """The same of an address."""
    path = _web_folder() / Path(urlparse(url).path).name

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_wait()).close()
        except urllib.error.HTTPError:  # an answer
            pass

    def fetch():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            urllib.request.urlretrieve(url, part)  # raises where the connection ends early, which torch.hub does not see
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path

    return path if path.is_file() else None, ask, fetch


def _web_folder():
    return Path(torch.hub.get_dir(), "checkpoints")


def _wait():
    """Seconds for a first answer."""
    return int(os.environ.get("HF_HUB_ETAG_TIMEOUT", 5))


def _answered(ask):
    """Calls ask() in a thread of its own: looking up a name, and trying each address of it, would
    take longer than any timeout."""
    failures = []

    def run():
        try:
            ask()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_wait())
    if thread.is_alive():
        raise TimeoutError(f"no answer within {_wait()} s, which HF_HUB_ETAG_TIMEOUT sets")
    if failures:
        raise failures[0]


def check_classifier(name, state_dict, source):
    """Refuses a state_dict that is not that of timm's classifier `name`, of whatever classes: timm
    would load what fits and be silent."""
    with torch.device("meta"):
        model = timm.create_model(name)
    last = model.pretrained_cfg.get("classifier") or ()
    last = (last,) if isinstance(last, str) else tuple(last)
    own = model.state_dict()
    for key in (*own, *state_dict):
        if key.startswith(tuple(f"{layer}." for layer in last)):
            continue
        if key in own and key in state_dict:
            reason = misfit(own[key], state_dict[key])
        else:
            reason = "is missing" if key in own else "is unknown"
        if reason:
            raise ValueError(f"pretrained must be weights of timm's {name}; in {source} {shown(key)} {reason}")
