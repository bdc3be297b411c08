"""``graphcache serve`` as a process of its own: what it prints, what it answers, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from graphcache.cli import main
from tests.cli import nets
from tests.serving.cluster.conftest import free_port, path

grpc = pytest.importorskip("grpc")
HERE = {"PYTHONPATH": path(), "GRAPHCACHE_NATIVE": "0"}


@contextmanager
def serving(folder: Path, *args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, none of whose processes is left at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "graphcache", "serve", *args],
        cwd=folder,
        env={**os.environ, **HERE, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        for pid in session_of(process.pid):
            os.kill(pid, signal.SIGKILL)


def session_of(pid: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                fields = (each / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(each.name))
    return found


def open_ports(pids: list[int]) -> set[int]:
    """Ports on which some processes listen on other addresses than the loopback."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    # In the order of the host's bytes: 127.0.0.1, and the same as IPv6 has it, and ::1.
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and fields[9] in inodes and address not in loopback:
                found.add(int(port, 16))
    return found


def asked(port: int, x: torch.Tensor, token: str = "") -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"inputs": [{"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        connection.request("POST", "/v2/models/mlp/infer", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        # Ray's own proxy answers in plain text, a 404 while it stops.
        is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text.decode()
    finally:
        connection.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
def test_it_serves_until_it_is_told_to_stop_and_loses_nothing_then(tmp_path, capsys):
    shutil.copy(nets.__file__, tmp_path / "nets.py")
    port, module = free_port(), nets.mlp()
    options = ["--module", "nets.py:mlp", "--prepare", "input:1x16", "--bucket", "1,4"]
    options += ["--port", str(port), "--drain", "30"]
    with serving(tmp_path, *options, GRAPHCACHE_SERVE_TOKEN="a.token") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port} serves mlp (input:*x16 -> output_0:*x4); ready after "), (
            line or process.communicate()[1]
        )
        assert asked(port, torch.zeros(1, 16))[0] == 401
        # Replicas alone listen to more than the loopback, and to nobody without this server's secret.
        for other in open_ports(session_of(process.pid)):
            with grpc.insecure_channel(f"127.0.0.1:{other}") as channel, pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=60)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        outcomes: Counter[str] = Counter()
        enough, lock = threading.Event(), threading.Lock()

        def client(index: int) -> None:
            generator = torch.Generator().manual_seed(index)
            while True:
                x = torch.randn(1 + index % 2, 16, generator=generator)
                try:
                    status, answer = asked(port, x, "a.token")
                except OSError:
                    # Nobody listens any more; a connection that was taken and cut would be another error.
                    outcome = "refused"
                except Exception as error:
                    outcome = f"lost: {error!r}"
                else:
                    got = torch.tensor(answer["outputs"][0]["data"]) if status == 200 else None
                    right = got is not None and torch.allclose(got, module(x).flatten(), atol=1e-5)
                    outcome = "answered" if right else f"{status}" if status != 200 else "wrong"
                with lock:
                    outcomes[outcome] += 1
                    if outcomes["answered"] >= 50:
                        enough.set()
                if outcome != "answered":
                    return

        clients = [threading.Thread(target=client, args=(index,)) for index in range(8)]
        for each in clients:
            each.start()
        assert enough.wait(60), outcomes
        process.send_signal(signal.SIGTERM)
        for each in clients:
            each.join(60)
        out, err = process.communicate(timeout=60)
    with capsys.disabled():
        print(f"\ngraphcache serve, SIGTERM under the load of 8 clients: {dict(outcomes)}")
    assert process.returncode == 0, err
    assert (out, err) == ("", "")
    # Each client's last request alone was not answered, and was told so.
    assert set(outcomes) <= {"answered", "503", "refused", "404"}, outcomes
    assert sum(outcomes.values()) - outcomes["answered"] == 8
    assert session_of(process.pid) == []


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nothing.engine"], 1, "there is no file nothing.engine; expected an engine, a package, a folder of"),
        ([], 2, "Missing what to serve: an engine, a package, a folder, or --module MODULE:FACTORY."),
        (["--module", "nets"], 2, "--module: 'nets' is no factory; such as package.module:function."),
        (["--module", "n.py:f", "--bucket", "1", "--bucket", "2"], 2, "gives the sizes of the rows twice"),
        (["n.py:f", "--bucket", "x:1"], 2, "'x:1' are no sizes; expected such as 1,8,32"),
        (["n.py:f", "--bucket", "1", "--bucket", "2"], 2, "gives the sizes of the rows twice"),
        (["n.py:f", "--bucket", "x:1=4", "--bucket", "x:1=8"], 2, "names axis 1 of 'x' twice"),
        (["n.py:f", "--prepare", "x:[]"], 2, "'x' has no dimensions, and so no rows"),
        (["n.py:f", "--prepare", "x:[1,2]:floaty"], 2, "has the dtype 'floaty', which torch lacks"),
        (["n.py:f", "--token", "two words"], 1, "token is of type str and not as RFC 6750 has it"),
        (["n.py:f", "--port", "0"], 2, "0 is not in the range"),
    ],
)
def test_bad_arguments(args, code, message):
    found = CliRunner().invoke(main, ["serve", *args])
    assert found.exit_code == code, found.output
    assert message in " ".join(found.stderr.split())
