"""Sweeps on a cluster: a real Dask scheduler with two worker processes on loopback, one of them killed in mid-run; what a
worker must share with the collector; what is refused; and the recipes of the book."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future
from dataclasses import replace

import dask
import distributed
import psutil
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker

from nrlib import backbone, cluster, runs, tasks
from nrlib import records as records_module
from nrlib import sweep as sweeping
from nrlib.cluster import check_workers, open_executor, parse_target
from nrlib.errors import BackboneError, ClusterError
from nrlib.records import Record, load_record, read_counts
from nrlib.storage import project_directory, results_directory
from nrlib.sweep import SweepError, sweep

N_STEPS = 20  # of a small run
VICTIM, LAST_STEP = 4, 12  # the seed whose worker is killed, and in which step

# Loaded by every worker: notes what is trained, and hangs in one step of one run, until the worker is killed.
PRELOAD = """
import functools, json, os, time
from nrlib import backbone, runs, tasks
from nrlib.training import train

folder = os.environ["NRLIB_TEST_FOLDER"]

def note(**event):
    with open(os.path.join(folder, "events.jsonl"), "a") as handle:
        handle.write(json.dumps({**event, "pid": os.getpid()}) + "\\n")

def noting(function, kind):
    def noting_train(model, batches, *args, description="", **kwargs):
        batch = batches.batch
        def noted(step):
            note(kind=kind, name=description, step=step)
            if [description, step] == json.loads(os.environ["NRLIB_TEST_VICTIM"]):
                try:
                    os.mkdir(os.path.join(folder, "hangs"))
                except FileExistsError:
                    return batch(step)
                with open(os.path.join(folder, "pid.tmp"), "w") as handle:
                    handle.write(str(os.getpid()))
                os.replace(os.path.join(folder, "pid.tmp"), os.path.join(folder, "pid"))
                time.sleep(600)
            return batch(step)
        batches.batch = noted
        return function(model, batches, *args, description=description, **kwargs)
    return noting_train

def noted_run_or_load(config, **kwargs):
    note(kind="task", name=config.run_id)
    return runs.run_or_load(config, **kwargs)

# from the originals: Dask loads this file twice
tasks.run_or_load = noted_run_or_load
runs.train = noting(train, "run")
backbone.train = noting(train, "backbone")
runs.checkpoint_hooks = functools.partial(backbone.checkpoint_hooks, seconds_between_saves=0.0)
"""


def refuse(*_, **__):
    raise AssertionError("this should not have been called")


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("NRLIB_COUNTS", str(tmp_path / "runs.jsonl"))
    monkeypatch.delenv("NRLIB_EXECUTOR", raising=False)


def page():
    return (project_directory() / "book" / "use_cluster.md").read_text(encoding="utf-8")


def recipe(name):
    """The code block of the page that begins with the comment `# name`."""
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page(), flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}\n")]
    return found


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory, small_config):
    """Scheduler and workers as the page starts them on one machine; yields the folder of the scheduler's file."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "preload.py").write_text(PRELOAD)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(project_directory()), os.environ.get("PYTHONPATH", "")]),
        "NRLIB_CACHE": str(folder / "cache"),
        "NRLIB_TEST_FOLDER": str(folder),
        "NRLIB_TEST_VICTIM": json.dumps([small_config(seed=VICTIM).run_id, LAST_STEP]),
    }
    scheduler_line, worker_line = (
        line.rstrip(" &") for line in recipe("one machine").splitlines() if line.startswith("dask ")
    )
    more = f" --resources GPU=1 --preload {folder / 'preload.py'} --local-directory {folder}"
    processes, log = [], open(folder / "log", "w")  # noqa: SIM115  (closed below)
    try:
        for line in (scheduler_line.replace("$HOME", str(folder)), worker_line.replace("$HOME", str(folder)) + more):
            command = [sys.executable, "-m", *shlex.split(line)]
            processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
        wait_for_workers(folder, 2)
        yield folder
    finally:
        tree = [p for process in processes for p in (*psutil.Process(process.pid).children(recursive=True), process)]
        for process in tree:
            process.kill()
        for process in processes:
            process.wait(timeout=30)
        log.close()


def wait_for_workers(folder, n_workers):
    for _ in range(600):
        if (folder / "scheduler.json").exists():
            with distributed.Client(scheduler_file=str(folder / "scheduler.json"), set_as_default=False) as client:
                return client.wait_for_workers(n_workers, timeout=180)
        time.sleep(0.1)
    raise AssertionError((folder / "log").read_text()[-3000:])


@pytest.fixture
def on_cluster(dask_cluster, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(dask_cluster / "cache"))
    monkeypatch.setenv("NRLIB_EXECUTOR", str(dask_cluster / "scheduler.json"))
    return dask_cluster


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def kill_when_it_hangs(folder):
    path = folder / "pid"
    while not path.exists():
        time.sleep(0.05)
    os.kill(int(path.read_text()), signal.SIGKILL)


# --- what a worker must share with the collector ----------------------------------------------------------------------


class Elsewhere(Executor):
    """Runs what it is given at once, on a worker whose cache and results are `folder`'s, as far as it can tell."""

    def __init__(self, folder):
        self.folder = folder

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NRLIB_CACHE", str(self.folder / "cache"))
            patch.setenv("NRLIB_RESULTS", str(self.folder / "results"))
            patch.setattr(runs, "_BACKBONE_METRICS", {})
            future.set_result(function(*args, **kwargs))
        return future


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_records_of_workers_with_another_disk_are_stored_here_too(own_cache, small_config, tmp_path):
    configs = [small_config(seed=seed) for seed in (0, 1)]
    records = sweep(configs, executor=Elsewhere(tmp_path / "far"), progress=False)
    assert [load_record(config) for config in configs] == records
    for folder in (own_cache, tmp_path / "far" / "cache"):
        assert len(list((folder / "records").iterdir())) == 2
    assert not (own_cache / "backbones").exists()  # trained where the runs are, and shared by them
    assert len(list((tmp_path / "far" / "cache" / "backbones").iterdir())) == 1


def test_published_records_come_home_and_name_the_commit(own_cache, small_config, tmp_path, monkeypatch):
    state = ["a" * 40, False]
    for module in (records_module, runs, tasks):
        monkeypatch.setattr(module, "git_state", lambda: tuple(state))
    config, far = small_config(seed=0), tmp_path / "far"
    sweep([config], executor=Elsewhere(far), progress=False)  # of an unknown commit, in the worker's cache
    monkeypatch.setenv("NRLIB_PUBLISH", "1")
    (record,) = sweep([config], executor=Elsewhere(far), progress=False)
    for folder in (tmp_path / "results", far / "results"):
        assert [path.name for path in folder.iterdir()] == [f"{config.run_id}.json"]
    assert record.provenance["git_commit"] == "a" * 40 and record.provenance["is_dirty"] is False

    expected = tasks.expect(config)
    state[0] = "b" * 40
    assert "at commit bbbbbbbbbbbb" in str(tasks.run_task(config, notebook="", expected=expected))


def test_a_sweep_that_does_not_publish_says_so_to_its_workers(own_cache, small_config, monkeypatch):
    config = small_config(seed=0)
    expected = tasks.expect(config)
    monkeypatch.setenv("NRLIB_PUBLISH", "1")  # left by the sweep before
    tasks.backbone_task(config, expected=expected)
    assert isinstance(tasks.run_task(config, notebook="", expected=expected), Record)
    assert not results_directory().exists() and load_record(config)


def test_a_worker_without_the_backbone_trains_nothing(own_cache, small_config, tmp_path, monkeypatch):
    config = small_config(seed=0)
    monkeypatch.setattr(runs, "train", refuse)
    monkeypatch.setattr(backbone, "train", refuse)
    with pytest.raises(
        SweepError, match=r"ClusterError: .* does not see the backbone .*share one cache: set NRLIB_CACHE"
    ):
        monkeypatch.setattr(sweeping, "backbone_task", _no_backbone)
        sweep([config], executor=Elsewhere(tmp_path / "far"), progress=False)


@pytest.mark.parametrize("change", [{"corpora": {"new_domain": "0" * 16}}, {"backbone": "0" * 16}])
def test_a_worker_that_reads_other_text_trains_nothing(change, own_cache, small_config, monkeypatch):
    monkeypatch.setattr(tasks, "run_or_load", refuse)
    config = small_config(seed=0)
    error = tasks.run_task(config, notebook="", expected=replace(tasks.expect(config), **change))
    assert isinstance(error, ClusterError) and "reads other text" in str(error)
    assert ("new_domain" if "corpora" in change else "tokenised") in str(error)


def test_a_task_that_runs_twice_keeps_the_first_record(own_cache, small_config, monkeypatch):
    config = small_config(seed=0)
    expected, run_and_keep, first = tasks.expect(config), runs.run_and_keep, []
    assert tasks.backbone_task(config, expected=expected) is None

    def late(config, **kwargs):  # while this one trains, another worker ends the same run
        if not first:
            first.append(None)
            first[0] = tasks.run_task(config, notebook="first", expected=expected)
        return run_and_keep(config, **kwargs)

    monkeypatch.setattr(runs, "run_and_keep", late)
    second = tasks.run_task(config, notebook="second", expected=expected)
    assert second == first[0] == load_record(config) and second.notebook == "first"


@pytest.mark.parametrize("error", [FloatingPointError("nan"), BackboneError("not causal")])
def test_errors_that_would_come_again_are_returned_to_no_retry(error, small_config, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tasks, "check_worker", fail)
    assert tasks.run_task(small_config(), notebook="", expected=tasks.expect(small_config())) is error
    assert tasks.backbone_task(small_config(), expected=tasks.expect(small_config())) is error


def test_errors_that_may_pass_are_raised_for_a_retry(small_config, monkeypatch):
    expected = tasks.expect(small_config())
    monkeypatch.setattr(tasks, "run_or_load", _broken_device)
    monkeypatch.setattr(tasks, "check_worker", _no_backbone)
    with pytest.raises(RuntimeError, match="CUDA error"):
        tasks.run_task(small_config(), notebook="", expected=expected)


def _broken_device(*_, **__):
    raise RuntimeError("CUDA error: an uncorrectable error")


def test_runs_whose_scheduler_is_gone_are_failed_runs(small_config, monkeypatch):
    class Closed(Executor):
        def submit(self, *_, **__):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    monkeypatch.setattr(sweeping, "_prepare", _no_backbone)
    with pytest.raises(SweepError, match="ClusterError: The run was cancelled"):
        sweep([small_config(seed=94)], executor=Closed(), progress=False)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp://10.0.0.5:8786", "without TLS"),
        ("tcp://head-node:8786", "without TLS"),
        ("tcp://0.0.0.0:8786", "without TLS"),
        ("ws://127.0.0.1:8786", "no address"),
        ("tls://head-node", "no address"),
        ("tls://head-node:port", "no address"),
        ("scheduler.json", "relative path"),
        ("/nowhere/scheduler.json", "neither an address nor a file"),
        ("tls://head-node:8786?gpu=1", "option 'gpu'"),
        ("tls://head-node:8786?GPU=all", "whole number"),
        ("tls://head-node:8786?retries=", "whole number"),
    ],
)
def test_addresses_that_are_refused(text, words):
    with pytest.raises(ClusterError, match=words) as caught:
        parse_target(text)
    assert "\n" not in str(caught.value)


def test_addresses_that_are_taken(tmp_path):
    assert parse_target("tcp://127.0.0.1:8786") == cluster.Target("tcp://127.0.0.1:8786", {}, 2)
    assert parse_target("tcp://localhost:1") == cluster.Target("tcp://localhost:1", {}, 2)
    assert parse_target("tls://head:8786?GPU=2&retries=0") == cluster.Target("tls://head:8786", {"GPU": 2.0}, 0)
    path = tmp_path / "scheduler.json"
    path.write_text(json.dumps({"address": "tls://10.0.0.5:1234"}))
    assert parse_target(f"{path}?GPU=1") == cluster.Target("tls://10.0.0.5:1234", {"GPU": 1.0}, 2)
    path.write_text(json.dumps({"address": "tcp://10.0.0.5:1234"}))
    with pytest.raises(ClusterError, match="without TLS"):
        parse_target(str(path))


def test_workers_that_are_refused():
    good = {"nthreads": 1, "resources": {"GPU": 1}}
    check_workers({"tls://10.0.0.6:1": good, "tcp://127.0.0.1:2": good | {"resources": {}}}, {"GPU": 1.0})
    for workers, words in [
        ({"tcp://10.0.0.6:1": good}, "A worker listens at tcp://10.0.0.6:1, without TLS"),
        ({"tls://10.0.0.6:1": good | {"nthreads": 4}}, "has 4 threads"),
        ({"tls://10.0.0.6:1": good | {"resources": {}}}, "no worker offers that"),
    ]:
        with pytest.raises(ClusterError, match=words):
            check_workers(workers, {"GPU": 1.0})


def test_a_scheduler_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(ClusterError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:9"),
        open_executor("tcp://127.0.0.1:9"),
    ):
        pass


# --- with real processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_in_mid_run_loses_nothing(on_cluster, small_config, monkeypatch):
    for module in (runs, backbone):
        monkeypatch.setattr(module, "train", refuse)  # nothing is trained in this process
    configs = [small_config(seed=seed) for seed in range(5)]
    names = [config.run_id for config in configs]
    threading.Thread(target=kill_when_it_hangs, args=(on_cluster,), daemon=True).start()
    records = sweep(configs, notebook="methods", progress=False)

    assert [record.run_config for record in records] == configs
    assert [load_record(config) for config in configs] == records
    assert read_counts() == {"loaded": 0, "trained": 5, "failed": 0}
    killed, victim = int((on_cluster / "pid").read_text()), names[VICTIM]

    steps = {name: [e["step"] for e in events(on_cluster, "run") if e["name"] == name] for name in names}
    assert all(steps[name] == list(range(N_STEPS)) for name in names if name != victim)
    # the other worker goes on from the checkpoint: only the step that the kill interrupted is begun twice
    assert steps[victim] == [*range(LAST_STEP + 1), *range(LAST_STEP, N_STEPS)]
    workers = [e["pid"] for e in events(on_cluster, "task") if e["name"] == victim]
    assert len(workers) == 2 and workers[0] == killed != workers[1]

    # what the killed worker had finished is not even asked for again
    asked = [e["name"] for e in events(on_cluster, "task")]
    assert any(e["pid"] == killed and e["name"] != victim for e in events(on_cluster, "task"))
    assert sorted(asked) == sorted([*names, victim])
    assert len({e["pid"] for e in events(on_cluster, "backbone")}) == 1
    assert len({e["step"] for e in events(on_cluster, "backbone")}) == len(events(on_cluster, "backbone"))


@pytest.mark.slow
def test_every_port_is_bound_to_loopback(on_cluster):
    ours = [process for process in psutil.process_iter() if str(on_cluster) in _command(process)]
    ours += [child for process in ours for child in process.children(recursive=True)]
    ports = [
        c.laddr for p in {p.pid: p for p in ours}.values() for c in p.net_connections("inet") if c.status == "LISTEN"
    ]
    assert len(ports) >= 3  # the scheduler's, and one of each worker
    assert {address.ip for address in ports} == {"127.0.0.1"}


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def other_code(monkeypatch):
    """This process has edited sources and another torch than the workers."""
    found = tasks.package_versions()
    monkeypatch.setattr(tasks, "package_versions", lambda: found | {"torch": "1.0.0+cpu"})
    monkeypatch.setattr(tasks, "_source_fingerprint", lambda: "0" * 16)
    tasks.describe_code.cache_clear()
    yield
    tasks.describe_code.cache_clear()


@pytest.mark.slow
def test_a_worker_with_other_code_is_refused_before_any_work(on_cluster, other_code, small_config, monkeypatch):
    monkeypatch.setattr(sweeping, "_prepare", refuse)
    with pytest.raises(ClusterError, match=r"torch 2\.\S+ instead of 1\.0\.0") as caught:
        sweep([small_config(seed=91)], progress=False)
    assert "instead of 0000000000000000" in str(caught.value) and "restart the workers" in str(caught.value)


@pytest.mark.slow
def test_a_run_takes_a_resource_of_its_worker(on_cluster, small_config, monkeypatch):
    monkeypatch.setenv("NRLIB_EXECUTOR", f"{on_cluster / 'scheduler.json'}?GPU=2")
    with monkeypatch.context() as patch, pytest.raises(ClusterError, match="no worker offers that"):
        patch.setattr(sweeping, "_prepare", refuse)
        sweep([small_config(seed=92)], progress=False)
    monkeypatch.setenv("NRLIB_EXECUTOR", f"{on_cluster / 'scheduler.json'}?GPU=1")
    (record,) = sweep([small_config(seed=92)], progress=False)
    assert record.provenance["device"].startswith("cpu") and record.provenance["n_threads"] == 1


@pytest.mark.slow
def test_a_worker_that_reads_other_text_stops_the_sweep(on_cluster, small_config, monkeypatch):
    monkeypatch.setattr(sweeping, "expect", lambda config, _: replace(tasks.expect(config), corpora={"proxy": "0"}))
    with pytest.raises(ClusterError, match=r"reads other text.*proxy"):
        sweep([small_config(seed=93)], progress=False)


def _no_backbone(*_, **__):
    return None


# --- the recipes of the book ------------------------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path, monkeypatch):
    """The certificate and the configuration of the page, in a home of the test's own."""
    subprocess.run(
        ["bash", "-euc", recipe("certificate")],
        env={**os.environ, "HOME": str(tmp_path)},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / ".config/dask/tls/key.pem").stat().st_mode & 0o077 == 0
    settings = yaml.safe_load(recipe("~/.config/dask/nrlib.yaml").replace("/home/you", str(tmp_path)))
    with dask.config.set(dask.config.merge(dask.config.config, settings)):
        yield


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
def test_with_the_certificate_and_only_with_it(certificates, small_config):
    settings = {"host": "tls://127.0.0.1", "dashboard_address": "127.0.0.1:0", "protocol": "tls://"}
    security = distributed.Security()  # from the configuration
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, processes=False, security=security, **settings
    ) as local:
        address = local.scheduler_address
        assert address.startswith("tls://")
        threading.Timer(0.5, local.scale, [1]).start()  # as from a queue: the executor waits for it
        with open_executor(address) as executor:
            assert executor.submit(os.getpid).result(timeout=30) == os.getpid()
        nobody = {"distributed.comm.tls.client.cert": None, "distributed.comm.tls.client.key": None}
        with (
            dask.config.set(nobody),
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ClusterError, match="No Dask scheduler answers"),
        ):
            patch.setattr(cluster, "CONNECT_SECONDS", 1)
            with open_executor(address):
                pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
def test_the_job_script_for_slurm(certificates, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(recipe("slurm"), "slurm", "exec"), names)
    with names["cluster"] as slurm:
        script = slurm.job_script()
        assert slurm.scheduler_address.startswith("tls://")
    assert "#SBATCH --gres=gpu:1" in script and "#SBATCH --cpus-per-task=8" in script
    (command,) = [line for line in script.splitlines() if "distributed.cli.dask_worker" in line]
    assert "tls://" in command and "tcp://" not in command and "--protocol tls://" in command
    assert "--nthreads 1" in command and "--dashboard-address 127.0.0.1:0" in command
    assert re.search(r"--nworkers [^1]|-nprocs", command) is None


def test_the_manifests_open_nothing_to_the_world():
    parts = list(yaml.safe_load_all(recipe("kubernetes")))
    assert [part["kind"] for part in parts].count("Deployment") == 2
    services = [part["spec"] for part in parts if part["kind"] == "Service"]
    assert [service["type"] for service in services] == ["ClusterIP"]
    assert any(part["kind"] == "NetworkPolicy" for part in parts)
    pods = [part["spec"]["template"] for part in parts if "template" in part["spec"]]
    assert len(pods) == 3
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
        assert "ports" not in container and "hostNetwork" not in pod["spec"]
        if container["command"][0] == "dask":
            check_dask_command(container["command"])
            assert container["command"][container["command"].index("--protocol") + 1] == "tls"
    (job,) = [pod for pod in pods if pod["metadata"]["labels"]["part"] == "sweep"]
    environment = {entry["name"]: entry["value"] for entry in job["spec"]["containers"][0]["env"]}
    assert parse_target(environment["NRLIB_EXECUTOR"]).address == f"tls://{parts[1]['metadata']['name']}:8786"


def test_shell_recipes_are_shell_and_their_options_exist():
    commands = []
    for name in ("one machine", "certificate", "ssh", "secret", "several GPUs"):
        subprocess.run(["bash", "-n"], input=recipe(name), text=True, check=True)
        commands += re.findall(r"dask (?:scheduler|worker) [^&>\n]*", recipe(name))
    assert len(commands) == 5
    for command in commands:
        check_dask_command(shlex.split(command.replace("\\", "")))


def test_the_python_recipes_are_python():
    for name in ("slurm sweep", "python"):
        compile(recipe(name), name, "exec")


def check_dask_command(words):
    """Its options are options of Dask's, and its web pages are not open."""
    main = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[1]]
    known = {option for parameter in main.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
    assert words[words.index("--dashboard-address") + 1] == "127.0.0.1:0"
