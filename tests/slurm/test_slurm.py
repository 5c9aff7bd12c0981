"""The workflow on a real SLURM, through the shipped profile: what SLURM's own records say."""

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import cluster
import pytest
from cluster import live, run, until

from conftest import ROOT, Pipeline, copy_whole, failures, smaller
from eora import config as cfg
from eora import manifest, plan, shapes, stages

GPU = {"compress", "covariance", "decompose", "evaluate"}
CPU = {"tokenize", "adapter", "quantize_adapter"}
SHARDS = [f"decompositions/tiny/w2/eora/{shard}-of-2" for shard in range(2)]
JUDGED = "evaluations/tiny/original/text"


class OnSlurm(Pipeline):
    """The workflow as a user of the shipped profile runs it."""

    profile = ROOT / "profiles/slurm"

    def command(self, file: Path, *args: str) -> list[str | Path]:
        command = ["snakemake", "--snakefile", self.root / "Snakefile", "--configfile", file]
        # Jobs take some ten seconds here, not hours. Each look that finds none ended makes the
        # pause to the next one ten seconds longer.
        watch = ["--slurm-init-seconds-before-status-checks", "5"]
        return [*command, "--profile", self.profile, *watch, *args]

    @contextmanager
    def going(self, *args: str) -> Iterator["Going"]:
        """A snakemake that runs meanwhile; killed where nobody waits for its end."""
        with tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(
                self.command(self.write(), *args),
                cwd=self.folder,
                env={**os.environ, **self.env},
                stdout=told,
                stderr=subprocess.STDOUT,
            )
            try:
                yield Going(process, told)
            finally:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Going:
    """A snakemake that was started, and what it tells."""

    process: subprocess.Popen[bytes]
    told: IO[str]

    def end(self) -> str:
        """Wait for its success; return what it told."""
        code = self.process.wait()
        self.told.seek(0)
        output = self.told.read()
        assert code == 0, output[-5000:]
        return output


@pytest.fixture(scope="module")
def local(pipeline, tmp_path_factory) -> Pipeline:
    """What ran on this machine without SLURM, with a smaller config, one of each kind."""
    folder = tmp_path_factory.mktemp("local") / "run"
    copy_whole(pipeline.folder, folder)
    made = replace(pipeline, folder=folder, config=smaller(pipeline.config))
    done = made.snakemake()  # the report
    assert done.returncode == 0, failures(done.stdout, made.folder)
    return made


def on_slurm(local: Pipeline, folder: Path, results: bool = True) -> OnSlurm:
    """The same to run on SLURM in another folder, with what it made but for kept copies."""
    folder.mkdir()
    for name in (".snakemake", "results") if results else ():
        shutil.copytree(local.folder / name, folder / name, ignore=shutil.ignore_patterns(".store"))
    return OnSlurm(folder, local.config, local.env, local.root)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[cluster.Cluster]:
    """A running SLURM of one node with three cards; where none can be had the test is skipped."""
    reason = cluster.unavailable()
    if reason:
        pytest.skip(reason)
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def rule(job):
    """Which rule a SLURM job runs: the profile's executor notes it as the job's comment."""
    return re.match(r"rule_(\w+?)(_wildcards_|$)", job["Comment"])[1]


def sealed(folder, results):
    """A result's manifest, after a look at every file that it names."""
    outputs = manifest.load(results / folder)["outputs"]
    for name, told in outputs.items():
        assert manifest.sha256(results / folder / name) == told["sha256"]
    return (results / folder / manifest.NAME).read_bytes()


@pytest.fixture(scope="module")
def whole(slurm, local, tmp_path_factory):
    """The whole workflow on SLURM, from download to report, while tests of other runs go on."""
    made = on_slurm(local, tmp_path_factory.mktemp("cluster") / "run", results=False)
    with made.going() as snakemake:
        yield made, snakemake


@pytest.fixture(scope="module")
def finished(whole):
    """The same, ended."""
    made, snakemake = whole
    snakemake.end()
    return made


def forget(made, *folders):
    """Remove results; return the targets that make them again, and nothing else."""
    for folder in folders:
        shutil.rmtree(made.results / folder)
    return ["--", *(f"results/{folder}/{manifest.NAME}" for folder in folders)]


def frozen(made, *folders):
    """Wait until a process fills each result's folder, and stop it right there; the processes.

    They are looked for together: one may be done before the other begins.
    """
    pids = {}

    def all_stopped():
        for folder in folders:
            for partial in (made.results / folder).glob(".partial-*"):
                if folder not in pids:
                    pids[folder] = int(partial.name.rpartition("-")[2])
                    os.kill(pids[folder], signal.SIGSTOP)
        return len(pids) == len(folders)

    until(all_stopped, f"jobs at {', '.join(folders)}")
    return list(pids.values())


def running(slurm, made, name):
    """The running SLURM jobs of a rule, in the order of their submission."""
    jobs = [j for j in slurm.jobs(made.folder) if j["JobState"] == "RUNNING" and rule(j) == name]
    return sorted(jobs, key=lambda job: int(job["JobId"]))


def history(slurm, made, name):
    """(state, memory, time) of a rule's SLURM jobs, in the order of their submission."""
    jobs = sorted(slurm.jobs(made.folder), key=lambda job: int(job["JobId"]))
    return [(j["JobState"], j["MinMemoryNode"], j["TimeLimit"]) for j in jobs if rule(j) == name]


@pytest.fixture
def again(slurm, local, tmp_path) -> OnSlurm:
    """The locally finished local in a folder of its own."""
    return on_slurm(local, tmp_path / "run")


@pytest.fixture(scope="module")
def hanging(slurm, local, tmp_path_factory):
    """A run whose job hangs beyond its time. SLURM counts whole minutes, so this starts early."""
    made = on_slurm(local, tmp_path_factory.mktemp("hanging") / "run")
    with made.going(*forget(made, JUDGED)) as snakemake:
        frozen(made, JUDGED)
        (job,) = running(slurm, made, "evaluate")
        run("scontrol", "update", f"JobId={job['JobId']}", "TimeLimit=1")
        yield made, snakemake


def test_two_cards_run_two_decompositions_and_deaths_are_made_up_for(
    slurm, whole, hanging, again, local
):
    """One decomposition is cancelled; an evaluation gets too little memory, and then more."""
    little = ["--set-resources", "evaluate:mem_mb=550*attempt-300"]
    with again.going(*little, *forget(again, *SHARDS, JUDGED)) as snakemake:
        pids = frozen(again, *SHARDS)
        jobs = running(slurm, again, "decompose")
        assert len(jobs) == 2 and len({job["GRES"] for job in jobs}) == 2  # cards by their index
        run("scancel", jobs[0]["JobId"])
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        snakemake.end()

    states = [state for state, _, _ in history(slurm, again, "decompose")]
    assert sorted(states) == ["CANCELLED", "COMPLETED", "COMPLETED"]
    first, second = history(slurm, again, "evaluate")
    assert first == ("FAILED", "250M", "00:30:00") and second == ("COMPLETED", "800M", "00:45:00")
    logs = (again.folder / ".snakemake/slurm_logs/rule_evaluate").rglob("*.log")
    assert any("exceeded memory limit" in log.read_text() for log in logs)
    for folder in (*SHARDS, JUDGED):
        assert sealed(folder, again.results) == sealed(folder, local.results)


def test_snakemake_is_killed_and_its_jobs_live_on(slurm, again, local):
    """Nobody submits them twice without a word, and what they made is not made again."""
    targets = forget(again, *SHARDS)
    with again.going(*targets) as snakemake:
        pids = frozen(again, *SHARDS)
        snakemake.process.kill()
    assert "--unlock" in again.snakemake(*targets).stdout
    assert again.snakemake("--unlock").returncode == 0
    refused = again.snakemake(*targets)
    numbers = [job["JobId"] for job in running(slurm, again, "decompose")]
    assert refused.returncode != 0 and len(numbers) == 2
    assert f"scancel {' '.join(numbers)}" in refused.stdout

    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not any(map(live, slurm.jobs(again.folder))), "the jobs' end")
    assert again.snakemake(*targets).returncode == 0
    assert [state for state, _, _ in history(slurm, again, "decompose")] == ["COMPLETED"] * 2
    for folder in SHARDS:
        assert sealed(folder, again.results) == sealed(folder, local.results)


def uncommented(text, *replaced):
    """The shipped profile with the lines in force that only a cluster's own people know."""
    common, ours, as_default = re.split("(?m)^# --- .*$", text)
    ours = re.sub(r"(?m)^# (?=\s*(#|[\w-]+:))", "", ours)
    for old, new in replaced:
        assert old in ours
        ours = ours.replace(old, new)
    return common + ours + as_default


def test_what_only_a_cluster_knows(slurm, again, local, tmp_path):
    """Each of the profile's commented keys: partitions, account, kind of card, --gres, a command
    before each job, and options of sbatch. Of the QOS a SLURM without slurmdbd keeps no record."""
    again.profile = tmp_path / "profile"
    again.profile.mkdir()
    text = uncommented(
        (ROOT / "profiles/slurm/config.yaml").read_text(),
        ("decompose:  {gpu_model: a100}", 'decompose: {gpu: 0, gres: "gpu:a100:1"}'),
        ("module load cuda/13", f"echo loaded >> {tmp_path}/loaded"),
        ("--exclude=node13", "--nice=7"),
    )
    (again.profile / "config.yaml").write_text(text)
    made = ("tokens/tiny/rounding", SHARDS[0], JUDGED)
    with again.going(*forget(again, *made)) as snakemake:
        snakemake.end()
    jobs = {rule(job): job for job in slurm.jobs(again.folder)}
    told = {
        name: tuple(
            job.get(key, "").strip()
            for key in ("Partition", "Account", "TresPerJob", "TresPerNode", "Nice")
        )
        for name, job in jobs.items()
    }
    assert told == {
        "tokenize": ("cpu", "my-project", "", "", "7"),
        "compress": ("gpu", "my-project", "gres:gpu:a100:1", "", "0"),
        "decompose": ("gpu", "my-project", "", "gres:gpu:a100:1", "0"),
        "evaluate": ("gpu", "my-project", "gres:gpu:a100:1", "", "0"),
    }
    assert (tmp_path / "loaded").read_text().split() == ["loaded"] * 4
    for folder in made:
        assert sealed(folder, again.results) == sealed(folder, local.results)


def test_gpu_jobs_get_one_card_each_and_others_none(slurm, finished):
    jobs = slurm.jobs(finished.folder)
    assert {rule(job) for job in jobs} == GPU | CPU  # downloads and report ran here
    for job in jobs:
        assert job["JobState"] == "COMPLETED" and job["Restarts"] == "0"
        assert job.get("TresPerJob", "").strip() == ("gres:gpu:1" if rule(job) in GPU else "")


def test_jobs_ask_slurm_for_what_the_plan_says(slurm, finished):
    config = cfg.validate(
        finished.config, cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    )
    known = shapes.known(config["models"]["tiny"], finished.results / "models/tiny")
    costs = plan.Costs(config, cuda=False)
    asked = {
        (rule(job), job["MinMemoryNode"], job["TimeLimit"], job["NumCPUs"])
        for job in slurm.jobs(finished.folder)
    }
    expected = {("tokenize", "4000M", "01:00:00", "1")}
    for place in stages.asked(config):
        if place.stage in GPU | CPU - {"tokenize"}:
            memory = 1.25 * plan.total(plan.peak(costs.of(place, known).host)) / 1e6
            expected.add((place.stage, f"{math.ceil(memory)}M", "00:30:00", "1"))
    assert asked == expected


def test_results_are_those_of_a_local_run(finished, local):
    config = cfg.validate(
        finished.config, cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    )
    folders = [place.folder for place in stages.asked(config)]
    assert len(folders) > 12
    for folder in folders:
        assert sealed(folder, finished.results) == sealed(folder, local.results), folder

    def rows(made):
        with (made.results / "summary.csv").open() as file:
            return {(r["model"], r["variant"], r["task"]): r["value"] for r in csv.DictReader(file)}

    assert rows(finished).items() <= rows(local).items()


def test_a_job_that_hung_beyond_its_time_is_made_up_for(slurm, hanging, local):
    made, snakemake = hanging
    snakemake.end()
    first, second = history(slurm, made, "evaluate")
    assert first[0] == "TIMEOUT" and second[0] == "COMPLETED" and second[2] == "00:45:00"
    assert sealed(JUDGED, made.results) == sealed(JUDGED, local.results)


def test_a_job_of_a_lost_node_is_queued_again(slurm, finished, hanging, again, local):
    """SLURM loses sight of it in the middle of its work; what lives on of it does no harm."""
    folder = SHARDS[0]
    with again.going(*forget(again, folder)) as snakemake:
        (first,) = frozen(again, folder)
        slurm.lose(*running(slurm, again, "decompose"))
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGCONT)
        snakemake.end()
    (job,) = (job for job in slurm.jobs(again.folder) if rule(job) == "decompose")
    assert job["Restarts"] == "1" and job["JobState"] == "COMPLETED"
    assert sealed(folder, again.results) == sealed(folder, local.results)
