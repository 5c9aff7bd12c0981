"""Cards: what CUDA_VISIBLE_DEVICES means, and real processes that take cards from a made list."""

import os
import random
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from conftest import ROOT
from eora import cards, cli

LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa11-0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-aa22-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-cc33-0)
  MIG 3g.20gb     Device  1: (UUID: MIG-dd44-1)
GPU 2: NVIDIA GeForce RTX 4090 (UUID: GPU-bb33-2)
"""
# Drivers before 470 name an instance by its card.
OLD = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-aa11-0)
  MIG 1g.5gb Device 0: (UUID: MIG-GPU-aa11-0/7/0)
  MIG 1g.5gb Device 1: (UUID: MIG-GPU-aa11-0/8/0)
"""


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["GPU-aa11-0", "MIG-cc33-0", "MIG-dd44-1", "GPU-bb33-2"]),
        ("2,0", ["GPU-bb33-2", "GPU-aa11-0"]),
        ("GPU-bb33-2, GPU-aa11-0", ["GPU-bb33-2", "GPU-aa11-0"]),
        ("GPU-bb", ["GPU-bb33-2"]),  # a beginning that one has
        ("GPU-aa,2", []),  # one that two have
        ("MIG-dd44-1,GPU-aa11-0", ["MIG-dd44-1", "GPU-aa11-0"]),
        ("1", ["MIG-cc33-0", "MIG-dd44-1"]),
        ("0,GPU-aa11-0,0", ["GPU-aa11-0"]),  # named twice, there once
        ("2,-1,0", ["GPU-bb33-2"]),  # CUDA stops where nothing is named
        ("2,7,0", ["GPU-bb33-2"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),  # SLURM's word for none
    ],
)
def test_what_may_be_used(visible, found):
    assert cards.usable(cards.parse(LISTING), visible) == found


def test_instances_of_older_drivers():
    found = cards.parse(OLD)
    assert cards.usable(found, None) == ["MIG-GPU-aa11-0/7/0", "MIG-GPU-aa11-0/8/0"]
    assert cards.usable(found, "MIG-GPU-aa11-0/8/0") == ["MIG-GPU-aa11-0/8/0"]


@pytest.mark.parametrize("listing", ["", "No devices found.\n", "NVIDIA-SMI has failed because\n"])
def test_no_cards(listing):
    assert cards.parse(listing) == []


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the cards that it is given: its nvidia-smi lists them."""

    def with_cards(listing):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        (tmp_path / "listing").write_text(listing)
        program.write_text(f'#!/bin/sh\ncat "{tmp_path}/listing"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    monkeypatch.setattr(cards, "LOCKS", tmp_path / "locks")
    for name in (cards.VISIBLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return with_cards


# A job: told to begin, it takes a card, marks it as in use (which fails if another job has it) and
# works until it is told to stop.
JOB = """
import logging, os, sys, time
from pathlib import Path
from eora import cards
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
sys.stdout.reconfigure(line_buffering=True)
cards.LOCKS = Path("locks")
sys.stdin.readline()
claim = cards.claim(poll=0.01)
mark = Path("used", os.environ["CUDA_VISIBLE_DEVICES"])
mark.touch(exist_ok=False)
print("working on", mark.name)
time.sleep(float(os.environ.get("SECONDS_OF_WORK", 0)))
sys.stdin.readline()
mark.unlink()
"""


@pytest.fixture
def job(tmp_path):
    """Starts jobs; ends those that are left."""
    (tmp_path / "used").mkdir()
    with ExitStack() as stack:

        def start(begin=True, **env):
            process = subprocess.Popen(
                [sys.executable, "-c", JOB],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            if begin:
                tell(process)
            return process

        yield start


def tell(process, times=1):
    process.stdin.write("\n" * times)
    process.stdin.flush()


def waits(process):
    """That a job finds all cards taken; what it says."""
    said = process.stdout.readline()
    assert said.startswith("Other jobs hold all")
    return said


def working(process):
    """The card that a job has found free."""
    said = process.stdout.readline()
    assert said.startswith("This job's card: "), said
    said = process.stdout.readline()
    assert said.startswith("working on "), said + process.stdout.read()
    return said.split()[-1]


def end(process):
    rest, _ = process.communicate("\n")
    assert process.returncode == 0, rest


def test_many_jobs_and_no_card_twice(machine, job):
    machine(LISTING)
    jobs = [job(begin=False, SECONDS_OF_WORK="0.02") for _ in range(24)]
    for process in jobs:
        tell(process, times=2)
    said = [process.communicate()[0] for process in jobs]
    assert [process.returncode for process in jobs] == [0] * 24, said
    used = {text.split()[-1] for text in said}
    # On a busy machine their moments of work may never be four at once; the next test's are.
    assert used <= {"GPU-aa11-0", "MIG-cc33-0", "MIG-dd44-1", "GPU-bb33-2"}


def test_all_cards_are_used_and_the_next_job_waits_and_says_so(machine, job):
    machine(LISTING)
    jobs = [job() for _ in range(4)]
    assert len({working(process) for process in jobs}) == 4
    late = job()
    said = waits(late)
    assert "all 4 cards that this one may use (GPU-aa11-0, MIG-cc33-0, MIG-dd44-1, GPU-bb" in said
    assert "--resources gpu=4" in said
    end(jobs[2])
    assert working(late)


def test_a_killed_jobs_card_is_free(machine, job, tmp_path):
    machine(LISTING)
    rng = random.Random(0)
    jobs = [job() for _ in range(4)]
    held = {process: working(process) for process in jobs}
    for _ in range(6):
        late = job()
        waits(late)
        victim = rng.choice(list(held))
        card = held.pop(victim)
        (tmp_path / "used" / card).unlink()
        victim.kill()
        held[late] = working(late)
        assert held[late] == card


@pytest.mark.parametrize("other", ["GPU-bb33-2", "GPU-bb", "0,2"])
def test_index_and_uuid_are_one_card(machine, job, other):
    machine(LISTING)
    first = job(CUDA_VISIBLE_DEVICES="2")
    assert working(first) == "GPU-bb33-2"
    second = job(CUDA_VISIBLE_DEVICES=other)
    if other == "0,2":
        assert working(second) == "GPU-aa11-0"
    else:
        assert "all 1 cards" in waits(second)
        end(first)
        assert working(second) == "GPU-bb33-2"


def test_what_slurm_gave_is_shared_inside_the_allocation_alone(machine, job, tmp_path):
    """Whether others of the machine's users may be on that card is SLURM's affair (shards, MPS)."""
    machine(LISTING)
    first = job(CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID="7")
    card = working(first)
    inside = job(CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID="7")
    waits(inside)
    (tmp_path / "used" / card).unlink()
    assert working(job(CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID="8")) == card


def test_a_machine_without_cards_takes_none_and_leaves_nothing(machine, monkeypatch):
    machine("No devices found.\n")
    assert cards.claim() is None
    monkeypatch.setenv("PATH", "")
    assert cards.claim() is None
    assert cards.VISIBLE not in os.environ and not cards.LOCKS.exists()


def test_a_variable_that_names_no_card_is_told(machine, monkeypatch, caplog):
    machine(LISTING)
    monkeypatch.setenv(cards.VISIBLE, "9")
    assert cards.claim() is None and os.environ[cards.VISIBLE] == "9"
    assert "CUDA_VISIBLE_DEVICES=9 names none of this machine's cards" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("before", [None, "2"])
def test_a_torch_without_cuda_gives_the_card_back(machine, job, monkeypatch, before):
    machine(LISTING)
    if before is not None:
        monkeypatch.setenv(cards.VISIBLE, before)
    assert cli.device("auto") == "cpu"
    assert os.environ.get(cards.VISIBLE) == before
    assert working(job()) == ("GPU-aa11-0" if before is None else "GPU-bb33-2")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ["cpu", "cuda:1"])
def test_a_named_device_takes_no_card(machine, monkeypatch, name, alone):
    machine(LISTING)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(cards.VISIBLE, "GPU-aa11-0,GPU-bb33-2")
    assert cli.device(name, alone) == ("cuda" if alone and name == "cuda:1" else name)
    assert not cards.LOCKS.exists()


def test_a_job_keeps_its_card_to_its_end(machine, job, monkeypatch):
    machine(LISTING)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "_CLAIMS", [])
    assert cli.device("auto") == "cuda" and os.environ[cards.VISIBLE] == "GPU-aa11-0"
    waits(job())
    assert working(job(CUDA_VISIBLE_DEVICES="0,2")) == "GPU-bb33-2"


@pytest.mark.parametrize(
    ("name", "visible", "then", "called"),
    [
        ("cpu", "0,1", "", "cpu"),
        ("cuda:1", None, "1", "cuda"),
        ("cuda:1", "3,GPU-5", "GPU-5", "cuda"),
        ("cuda:2", "3,4", "3,4", "cuda:2"),  # refused by what looks for it
    ],
)
def test_all_cards_but_one_are_hidden(monkeypatch, name, visible, then, called):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # and put back afterwards
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.device(name, alone=True) == called
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == then
