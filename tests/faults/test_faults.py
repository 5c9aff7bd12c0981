"""Sudden ends, on real jobs: a result is whole or not there, and a further run makes the rest."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, assert_remade, contents, failures, unsummed

# How many stages are killed; a hundred in half an hour: EORAFLOW_KILLS=100 pytest -k killed_stages
KILLS = int(os.environ.get("EORAFLOW_KILLS", "3"))
SEED = int(os.environ.get("EORAFLOW_KILLS_SEED", "0"))
SCRIPTS = (
    "download_model",
    "download_dataset",
    "check_model",
    "tokenize_text",
    "compress",
    "covariance",
    "decompose",
    "adapter",
    "quantize_adapter",
    "evaluate",
    "report",
)


@contextmanager
def started(flow, *args):
    """A run of the workflow, in a process group of its own; its output goes to output.txt."""
    with (flow.folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            flow.command(flow.write(), *args),
            cwd=flow.folder,
            env={**os.environ, **flow.env},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stages(run):
    """The stage processes of a run, by their scripts' names; not what they fork for themselves.

    AutoRound asks a fork what the CPU can do, and takes its death for an answer.
    """
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                forked = process.parent().cmdline() == command
                if len(command) > 1 and Path(command[1]).parent == ROOT / "scripts" and not forked:
                    found.append((Path(command[1]).stem, process, command))
    return found


def await_moment(rng, process, command, folder):
    """Some time after a stage began, or some time after it began to write."""
    if "--out" in command and rng.random() < 0.6:
        out = (folder / command[command.index("--out") + 1]).parent
        while process.is_running() and not list(out.glob(".partial-*")):
            time.sleep(0.001)
        time.sleep(rng.choice([0, 0.01, 0.1, 1]) * rng.random())
    else:
        time.sleep(4 * rng.random())


def test_killed_stages_leave_nothing_that_another_run_does_not_mend(small):
    """Each stage in turn at random moments, some with the run that started them; from nothing to
    the same results."""
    before = contents(small)
    small.config["runtime"]["store"] = False
    rng = random.Random(SEED)
    killed: list[str] = []
    while len(killed) < KILLS:
        shutil.rmtree(small.results)
        shutil.rmtree(small.folder / ".snakemake")
        doomed = rng.sample(SCRIPTS, min(KILLS - len(killed), len(SCRIPTS)))
        finished = False
        while not finished:
            with started(small, "--retries", "20") as run:
                seen = set()
                while run.poll() is None:
                    for name, process, command in stages(run):
                        if process.pid in seen:
                            continue
                        seen.add(process.pid)
                        if name not in doomed:
                            continue
                        doomed.remove(name)
                        await_moment(rng, process, command, small.folder)
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                            killed.append(name)
                            if rng.random() < 0.2:
                                os.killpg(run.pid, signal.SIGKILL)
                    time.sleep(0.01)
                output = (small.folder / "output.txt").read_text()
                assert run.returncode in (0, -signal.SIGKILL), failures(output, small.folder)
                finished = run.returncode == 0
            if not finished:  # it left its lock
                assert small.snakemake("--unlock").returncode == 0
        assert_remade(small, before)
        assert not list(small.results.rglob(".partial-*")), killed
    print(f"killed: {killed}")
    # A short one may come and go while another's moment is awaited.
    assert set(killed) == set(SCRIPTS) or 5 * len(SCRIPTS) > KILLS


@contextmanager
def disk(folder, size):
    """A disk of its own at ``folder``; skips where none may be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_ends_on_a_full_disk_and_goes_on_when_there_is_room(small):
    before = contents(small)
    small.config["runtime"]["store"] = False
    aside = small.results.rename(small.folder / "aside")
    with disk(small.results, "64m"):
        assert small.start("cp", "-a", f"{aside}/.", small.results).wait() == 0
        for made in ("compressed/tiny/w2", "covariance/tiny/moments"):
            shutil.rmtree(small.results / made)
        filler = small.results / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small.results).free - (60 << 10)))

        targets = [
            f"results/{made}/manifest.json"
            for made in ("compressed/tiny/w2", "covariance/tiny/moments/1-of-2")
        ]
        done = small.snakemake("--", *targets)
        assert done.returncode != 0
        told = re.findall(
            r"^Error: (\S+): No space left on device\. (.*)", done.stdout, re.MULTILINE
        )
        assert "results/compressed/tiny/w2" in [folder for folder, _ in told], done.stdout
        for _, mend in told:
            assert re.fullmatch(
                r"Nothing half-made is left; now [0-9.]+ MB are free there\. Free more, or set "
                "results to a folder on a larger disk",
                mend,
            )
        assert not list(small.results.rglob(".partial-*"))
        assert not (small.results / "compressed/tiny/w2/manifest.json").exists()

        filler.unlink()
        done = small.snakemake("--", *targets)
        assert done.returncode == 0, failures(done.stdout, small.folder)
        # For the shard that would follow the last.
        (small.results / "covariance/tiny/moments/1-of-2/hidden.safetensors").unlink()
        assert unsummed(contents(small)) == unsummed(before)


def test_a_second_run_in_the_same_folder_is_refused(small):
    """By Snakemake; it says what to do if there is no other run."""
    before = contents(small)
    with started(small, "--forcerun", "adapter") as first:
        while not (found := stages(first)):
            assert first.poll() is None
        for _, process, _ in found:
            process.suspend()
        done = small.snakemake("--forcerun", "adapter")
        assert done.returncode != 0
        assert "Directory cannot be locked" in done.stdout and "--unlock" in done.stdout
        assert str(small.folder) in done.stdout
        for _, process, _ in found:
            process.resume()
        assert first.wait() == 0
    assert unsummed(contents(small)) == unsummed(before)
