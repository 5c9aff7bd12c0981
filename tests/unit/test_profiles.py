"""What the shipped profiles set, read as Snakemake reads them."""

import sys

import pytest
from snakemake.cli import parse_args

from conftest import ROOT


def settings(monkeypatch, *argv):
    """Snakemake's settings for a command line that is given in the checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setattr(sys, "argv", ["snakemake", *argv])  # the default profile looks at it
    return parse_args(list(argv))[1]


def gpus(found):
    return found.resources["gpu"].value if "gpu" in found.resources else None


@pytest.mark.parametrize("argv", [(), ("--profile", "none"), ("--executor", "local")])
def test_one_gpu_job_at_a_time_on_this_machine(monkeypatch, argv):
    assert gpus(settings(monkeypatch, "--cores", "4", *argv)) == 1
    assert gpus(settings(monkeypatch, "--cores", "4", *argv, "--resources", "gpu=3")) == 3


@pytest.mark.parametrize("option", ["--profile", "--workflow-profile"])
def test_slurm_profile_is_complete_whichever_way_it_is_given(monkeypatch, option):
    here = settings(monkeypatch, "--cores", "4")
    there = settings(monkeypatch, option, "profiles/slurm")
    assert gpus(there) is None  # the cluster counts its own
    assert there.executor == "slurm" and there.retries == 2
    assert there.slurm_status_command == "squeue" and there.slurm_requeue
    for name in ("rerun_triggers", "rerun_incomplete", "keep_going", "latency_wait"):
        assert getattr(there, name) == getattr(here, name)
    assert there.rerun_incomplete


def test_another_executor_has_no_limit_of_gpu_jobs(monkeypatch):
    assert gpus(settings(monkeypatch, "--executor", "slurm", "--jobs", "3")) is None
