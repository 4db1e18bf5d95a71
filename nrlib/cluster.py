"""Sweeps on a Dask cluster: connect to a scheduler by its address, refuse one that is open to the network, check its
workers, and hand out an executor.

Dask runs what it is sent, so whoever reaches a scheduler without TLS runs code as its user. Only TLS and this machine's
own loopback addresses are taken.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .errors import ClusterError
from .tasks import check_code, describe_code

VARIABLE = "NRLIB_EXECUTOR"
FORM = "tls://HOST:PORT, tcp://127.0.0.1:PORT or the path of a scheduler file, perhaps with ?GPU=1 or &retries=N"
CONNECT_SECONDS = 20
DEFAULT_RETRIES = 2


@dataclass(frozen=True)
class Target:
    """address : of the scheduler; resources : what a run takes of a worker's; retries : after errors that may pass."""

    address: str
    resources: dict[str, float]
    retries: int


def parse_target(text: str) -> Target:
    """Read a value of NRLIB_EXECUTOR: an address or a scheduler file, and options after a question mark.

    Raises
    ------
    ClusterError
        For another form, a file that is not there, an unknown option, or an address that is neither TLS nor loopback.
    """
    place, _, options = text.partition("?")
    address = place if "://" in place else _read_scheduler_file(place, text)
    values = dict(parse_qsl(options, keep_blank_values=True))
    resources: dict[str, float] = {}
    if "GPU" in values:
        resources["GPU"] = _number(text, "GPU", values.pop("GPU"))
    retries = int(_number(text, "retries", values.pop("retries", str(DEFAULT_RETRIES))))
    if values:
        raise ClusterError(f"{text!r} has the option {min(values)!r}. Allowed are GPU and retries, as in {FORM}.")
    if not address.startswith(("tls://", "tcp://")) or _port(address) is None:
        raise ClusterError(f"{text!r} is no address of a Dask scheduler. Give {FORM}.")
    check_is_private(address, "The scheduler")
    return Target(address, resources, retries)


def check_is_private(address: str, who: str) -> None:
    """Raise ClusterError for an address that others can reach and that TLS does not protect."""
    if address.startswith(("tls://", "inproc://")) or (address.startswith("tcp://") and _is_loopback(address)):
        return
    raise ClusterError(
        f"{who} listens at {address}, without TLS and not on this machine alone: whoever reaches that port can run code "
        "there. Start it with --host 127.0.0.1, or with certificates and --protocol tls (see 'Use a cluster' in the book)."
    )


@contextmanager
def open_executor(text: str) -> Iterator[Executor]:
    """The executor of the Dask cluster that `text` names (see `parse_target`); waits for its first worker.

    Certificates come from Dask's own configuration (`distributed.comm.tls`). On leaving, what has not begun is cancelled.

    Raises
    ------
    ClusterError
        When there is no such scheduler, it or a worker is open to the network, or a worker cannot run these tasks.
    """
    target = parse_target(text)
    client = _connect(target.address)
    try:
        cluster = client.scheduler_info(n_workers=-1)
        check_is_private(cluster["address"], "The scheduler")
        if not cluster["workers"]:
            print(f"waiting for the first worker of {target.address}", file=sys.stderr)
            client.wait_for_workers(1)
            cluster = client.scheduler_info(n_workers=-1)
        check_workers(cluster["workers"], target.resources)
        _check_code(client)
        yield client.get_executor(pure=False, retries=target.retries, resources=target.resources)
    finally:
        client.close()


def _connect(address: str) -> Any:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ClusterError(
            f"{VARIABLE} names a Dask scheduler, but Dask is not installed ({error}). Install it with: "
            "pip install -c constraints.txt -e '.[cluster]'"
        ) from error
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="nrlib-sweep")
    except (OSError, TypeError, ValueError, RuntimeError) as error:  # TypeError: TLS without certificates
        raise ClusterError(
            f"No Dask scheduler answers at {address} ({type(error).__name__}: {str(error).strip()[:300]}). Start it, or "
            f"unset {VARIABLE} to use this machine. For a tls:// address, Dask's configuration must name the certificate "
            "and key (distributed.comm.tls.ca-file and distributed.comm.tls.client)."
        ) from error


def check_workers(workers: Mapping[str, Mapping[str, Any]], resources: Mapping[str, float]) -> None:
    """Raise ClusterError for a worker that is open to the network or would train several runs in one process, or if none
    offers the resources a run takes. `workers` is as in Dask's `scheduler_info`."""
    for address, worker in workers.items():
        check_is_private(address, "A worker")
        if worker["nthreads"] > 1:
            raise ClusterError(
                f"The worker {address} has {worker['nthreads']} threads and would train as many runs in one process, on "
                "one device. Start workers with --nthreads 1, and as many (--nworkers) as runs are to go side by side."
            )
    for name, amount in resources.items():
        if not any(worker["resources"].get(name, 0) >= amount for worker in workers.values()):
            raise ClusterError(
                f"Each run is to take {name}={amount:g}, but no worker offers that, so none would ever begin. Start "
                f"workers with --resources {name}={amount:g}, one for each device, or leave {name} out of {VARIABLE}."
            )


def _check_code(client: Any) -> None:
    """Of the scheduler, which unpacks what it passes on, and of the workers; those that join later are checked by their
    tasks."""
    found = {f"The worker {address}": code for address, code in client.run(describe_code, on_error="return").items()}
    try:
        found["The scheduler"] = client.run_on_scheduler(describe_code)
    except Exception as error:  # whatever unpickling a function of ours raises without us
        found["The scheduler"] = error
    for who, code in found.items():
        if isinstance(code, BaseException):
            raise ClusterError(
                f"{who} cannot run nrlib's tasks ({type(code).__name__}: {code}). Start it in an environment where this "
                "version of nrlib is installed."
            )
        check_code(code, describe_code(), who)


def _read_scheduler_file(place: str, text: str) -> str:
    path = Path(place).expanduser()
    if not path.is_absolute():
        raise ClusterError(
            f"{VARIABLE} = {text!r} is a relative path, and notebooks run in a folder of their own. Give the absolute path "
            f"of a scheduler's file, or an address: {FORM}."
        )
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{VARIABLE} = {text!r} is neither an address nor a file that a scheduler wrote with --scheduler-file "
            f"({type(error).__name__}: {error}). Give {FORM}."
        ) from error


def _number(text: str, name: str, value: str) -> float:
    if not value.isdecimal():
        raise ClusterError(f"{text!r} has {name}={value}; it must be a whole number, for example {name}=1.")
    return float(value)


def _port(address: str) -> int | None:
    try:
        return urlsplit(address).port
    except ValueError:
        return None


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
