"""``graphcache doctor`` says what works on a machine, by exit code, as text and as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = {"versions", "CUDA devices", "cuda-python", "TensorRT", "canary"}


@pytest.fixture(scope="module")
def doctor():
    """Runs ``graphcache doctor`` as a user does."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GRAPHCACHE_NATIVE": "0"}

    def run(*args):
        command = [sys.executable, "-m", "graphcache", "doctor", *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)

    return run


def test_every_check_has_a_verdict_and_what_is_not_well_a_remedy(doctor):
    ran = doctor("--json")
    told = json.loads(ran.stdout)
    checks = {each["check"]: each for each in told["checks"]}
    assert set(checks) >= CHECKS
    assert all(each["verdict"] == "ok" or each["remedy"] for each in checks.values())
    assert ran.returncode == (0 if told["failed"] == told["differences"] == 0 else 1), ran.stderr
    assert checks["versions"]["verdict"] == "ok"


def test_people_read_a_table(doctor):
    text = doctor().stdout
    assert all(name in text for name in CHECKS)
