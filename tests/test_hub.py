"""Without a network, and with a gated model: an answer in words within seconds. The hub is a server of the test's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from nrlib import hub
from nrlib.storage import project_directory

# Each answer: its seconds, its error and the message. Imports are not counted.
ASK = """
import json, sys, time
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from nrlib.backbone import backbone_shape, load_backbone
from nrlib.config import make_config
from nrlib.tokenization import load_tokenizer

answers = []
for ask in (load_backbone, load_tokenizer, lambda name: backbone_shape(make_config("smoke", backbone_name=name))):
    start = time.perf_counter()
    try:
        ask(sys.argv[1])
        answers.append((time.perf_counter() - start, "", ""))
    except Exception as error:
        answers.append((time.perf_counter() - start, type(error).__name__, str(error)))
print(json.dumps(answers))
"""


def ask(endpoint, cache, name="some/name"):
    """What a fresh process answers whose hub is at `endpoint`: [(seconds, error, message)] of backbone, tokenizer, shape."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(project_directory())}
    done = subprocess.run(
        [sys.executable, "-c", ASK, name], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def silent_server():
    """An address that neither accepts nor refuses, like one behind a firewall: its queue is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]
        for client in waiting:
            client.close()


def test_an_answer_within_five_seconds_where_connections_are_refused(tmp_path):
    with socket.socket() as server:  # bound, so that nobody else takes the port, and not listening
        server.bind(("127.0.0.1", 0))
        answers = ask(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
    for seconds, error, message in answers:
        assert seconds < 5 and error == "BackboneError"
        assert all(words in message for words in ("'some/name'", "cannot be reached", "local folder"))


def test_a_network_that_swallows_everything_costs_one_wait(monkeypatch):
    with silent_server() as port:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert not hub.is_reachable(seconds=0.3)


def test_a_model_in_the_cache_needs_no_network(tiny_model, tmp_path):
    snapshot = tmp_path / "hub" / "models--some--name" / "snapshots" / ("0" * 40)
    tiny_model().save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        model, tokenizer, shape = ask(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
    assert model[1:] == shape[1:] == ["", ""]
    assert tokenizer[1] == "BackboneError"  # there is none


class Gated(BaseHTTPRequestHandler):
    """What the hub says to somebody who has not accepted a model's licence."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model some/name is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_gated_model_without_a_token(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answers = ask(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    for _, error, message in answers:
        assert error == "BackboneError"
        assert all(words in message for words in ("'some/name'", "gated", "licence", "hf auth login")), message


@pytest.mark.parametrize(
    ("proxies", "expected"),
    [({}, ("hub.example", 443)), ({"https": "http://proxy.example:3128"}, ("proxy.example", 3128))],
)
def test_the_way_may_lead_through_a_proxy(proxies, expected, monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub.urllib.request, "proxy_bypass", lambda _: False)
    assert not hub.is_reachable()
    assert asked == [expected]
