"""The model hub, asked politely: a machine without a network gets its answer in seconds, from the cache or in words.

The hub's client retries a dead connection for most of a minute. Whether the hub can be reached at all is found out by
opening a connection first; where it cannot, only what is already in the client's cache is loaded.
"""

from __future__ import annotations

import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

SECONDS_TO_CONNECT = 3.0


def is_reachable(seconds: float = SECONDS_TO_CONNECT) -> bool:
    """Whether the hub, or the proxy on the way to it, accepts a connection within `seconds`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(endpoint.scheme, "")
    if proxy and not urllib.request.proxy_bypass(endpoint.netloc):
        endpoint = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            connected.set()
        except OSError:
            pass

    # In a thread, since looking up a name obeys no time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return connected.is_set()


def find(name: str | Path) -> str:
    """What to give to `from_pretrained`: a folder or a reachable model's name as they are; else its folder in the cache.

    Without a network, when nothing of that name is in the cache or it is no model's name, the errors are those of the
    hub's client, which `why_not_loaded` puts into words.
    """
    if Path(name).exists() or is_reachable():
        return str(name)
    from huggingface_hub import snapshot_download

    return snapshot_download(str(name), local_files_only=True)


def why_not_loaded(what: str, name: str, error: Exception) -> str:
    """One paragraph on a model or tokenizer that could not be loaded: what was asked for, the reason, what to do."""
    text = f"{type(error).__name__}: {error}"
    names = " ".join(cls.__name__ for e in (error, error.__cause__) if e for cls in type(e).__mro__)
    if Path(name).exists():
        remedy = f"The folder exists, but holds no {what} that transformers can load."
    elif "GatedRepo" in names or "gated repo" in text:
        remedy = (
            "It is gated: accept its licence on its hub page, log in with `hf auth login` (or set HF_TOKEN), and retry."
        )
    elif "LocalEntryNotFound" in names or "OfflineMode" in names:
        remedy = (
            "The hub cannot be reached from here, and no copy is in its cache. Check the network connection (or unset "
            "HF_HUB_OFFLINE), or give a local folder written by save_pretrained()."
        )
    else:
        remedy = "Check the name (a private model needs `hf auth login`), or give a local folder written by save_pretrained()."
    return f"The {what} {name!r} could not be loaded. {remedy} ({text.splitlines()[0][:300]})"
