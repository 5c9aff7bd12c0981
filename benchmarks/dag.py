"""How long Snakemake takes to build the job graph of a large config, and with how much memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent

# Two rules and nothing else: what Snakemake takes for a job, whatever the workflow.
BARE = """
rule all:
    input: [f"made/{{i}}.txt" for i in range({jobs} - 1)]

rule make:
    output: "made/{{i}}.txt"
    shell: "touch {{output}}"
"""

DEFAULT = ("2x6x5x2x6", "7x6x8x2x6", "50x6x8x2x6")

# Runs in a process of its own: snakemake builds the graph as ever, then each job's outputs are
# made, empty, and recorded as after a real run.
PRETEND = """
import os, sys
from snakemake import cli, dag

build = dag.DAG.init

async def build_and_finish(self, *args, **kwargs):
    await build(self, *args, **kwargs)
    now = 1_700_000_000
    for job in self.jobs:
        for file in job.output:
            file.prepare()
            if file.is_directory:
                os.makedirs(file, exist_ok=True)
            else:
                with open(file, "w") as made:
                    made.write("{}")
            os.utime(file, (now, now))
    self.workflow.iocache.clear()  # it holds that they are missing; their checksums are recorded
    for job in self.jobs:
        await self.workflow.persistence.finished(job)

dag.DAG.init = build_and_finish
cli.main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Size:
    """How many entries of each kind the config has."""

    models: int
    compressions: int
    ranks: int
    bits: int
    tasks: int

    def __str__(self) -> str:
        return "x".join(map(str, vars(self).values()))

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``models x compressions x ranks x bits x tasks``, such as 50x6x8x2x6."""
        numbers = [int(part) for part in text.split("x")]
        if len(numbers) != 5 or min(numbers) < 1 or numbers[3] > 5:
            raise typer.BadParameter(
                f"{text!r}: give models x compressions x ranks x bits (at most 5) x tasks, "
                "such as 50x6x8x2x6"
            )
        return cls(*numbers)

    def config(self, source: Path) -> dict[str, Any]:
        """A config of this size; all models and data are the one local file, never opened."""
        tasks: dict[str, Any] = {
            f"task{i}": {"perplexity": "texts", "window": 128 + i}
            if i % 2
            else {"lm_eval": f"task{i}"}
            for i in range(self.tasks)
        }
        return {
            "models": {f"model{i}": {"path": str(source)} for i in range(self.models)},
            "datasets": {"texts": {"path": str(source)}},
            "calibrations": {
                name: {"dataset": "texts", "samples": 8, "seqlen": 64}
                for name in ("rounding", "moments")
            },
            "compressions": {
                f"w{i}": {"bits": 2, "iters": i, "calibration": "rounding"}
                for i in range(self.compressions)
            },
            "adapters": {
                "eora": {
                    "calibration": "moments",
                    "ranks": [8 * (i + 1) for i in range(self.ranks)],
                    "max_rank": 8 * self.ranks,
                    "bits": [16, 4, 8, 3, 2][: self.bits],
                }
            },
            "tasks": tasks,
        }


@dataclass(frozen=True)
class Cost:
    """What one dry run took, and how many jobs it would run."""

    planned: int
    wall: float
    user: float
    memory: int


def dry_run(folder: Path, arguments: list[str]) -> Cost:
    """Time ``snakemake --dry-run`` in a fresh process."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", *arguments]
    start = time.perf_counter()
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, process.returncode, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"snakemake failed:\n{text[-3000:]}")
    planned = re.search(r"^total +(\d+)$", text, re.MULTILINE)
    return Cost(int(planned[1]) if planned else 0, wall, usage.ru_utime, usage.ru_maxrss // 1024)


def report(what: str, state: str, jobs: int, planned: int, cost: Cost) -> None:
    """Print one line of the table."""
    typer.echo(
        f"{what:<24} {state:<23} {jobs:6d} {planned:6d} {cost.wall:7.1f} {cost.user:7.1f} "
        f"{1000 * cost.user / jobs:7.2f} {cost.memory:6d}"
    )


def measure(what: str, folder: Path, arguments: list[str], edited: list[str] | None = None) -> int:
    """Measure all states of one graph; returns how many jobs it has.

    Args:
        what: name of the graph in the table.
        folder: an empty working directory.
        arguments: what snakemake is called with.
        edited: the same for a graph in which something changed, if that is to be measured too.
    """
    quiet = dry_run(folder, [*arguments, "--quiet"])
    printed = dry_run(folder, arguments)
    jobs = printed.planned
    report(what, "nothing done, --quiet", jobs, jobs, quiet)
    report(what, "nothing done", jobs, jobs, printed)
    pretend = [sys.executable, "-c", PRETEND, "--dry-run", "--quiet", *arguments]
    subprocess.run(pretend, cwd=folder, check=True, capture_output=True)
    done = dry_run(folder, arguments)
    report(what, "everything done", jobs, done.planned, done)
    if edited:
        changed = dry_run(folder, edited)
        report(what, "one task changed", jobs, changed.planned, changed)
    return jobs


def main(
    sizes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SIZE]...",
            help="models x compressions x ranks x bits x tasks [default: three of about 1,000, "
            "5,000 and 36,000 jobs]",
            show_default=False,
        ),
    ] = None,
    bare: Annotated[
        bool, typer.Option(help="Measure a graph of as many bare jobs beside each.")
    ] = True,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="One more argument for snakemake.")
    ] = None,
) -> None:
    """Time `snakemake -n` on generated configs: nothing done, everything done, one task changed.

    Each dry run is a fresh process in a temporary folder; no job runs and nothing is downloaded.
    With --quiet snakemake parses the rules and builds the graph; without, it also prints each job
    that it would run. "Everything done" has empty files for all results, and snakemake's records
    of them; that one change then makes only what follows from it stale shows that they count.

    Beside each is a graph of as many jobs of one bare rule: what Snakemake itself takes.
    User seconds are the ones to compare: other work on the machine adds to wall time.

    Examples:

        python benchmarks/dag.py                           # fifteen minutes on two cores

        python benchmarks/dag.py 7x6x8x2x6 --no-bare       # one size

        python benchmarks/dag.py 7x6x8x2x6 -o=--persistence-backend=db
    """
    parsed = [Size.parse(text) for text in sizes or DEFAULT]
    extra = option or []
    typer.echo(
        f"{'graph':<24} {'state':<23} {'jobs':>6} {'to do':>6} {'wall s':>7} {'user s':>7} "
        f"{'ms/job':>7} {'MB':>6}"
    )
    for size in parsed:
        with tempfile.TemporaryDirectory() as place:
            source, (ours, plain) = Path(place, "source.txt"), (Path(place, n) for n in "ab")
            ours.mkdir()
            plain.mkdir()
            source.write_text("{}")
            os.utime(source, (0, 0))
            config = size.config(source)
            (ours / "config.json").write_text(json.dumps(config))
            next(iter(config["tasks"].values()))["limit"] = 1
            (ours / "edited.json").write_text(json.dumps(config))
            arguments = ["--snakefile", str(ROOT / "Snakefile"), *extra, "--configfile"]
            first, second = ([*arguments, name] for name in ("config.json", "edited.json"))
            jobs = measure(f"eoraflow {size}", ours, first, second)
            if bare:
                (plain / "Snakefile").write_text(BARE.format(jobs=jobs))
                measure("bare rule", plain, extra)


if __name__ == "__main__":
    typer.run(main)
