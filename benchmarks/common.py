"""What the benchmarks share: the workflow's stages as processes, what they cost, and targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
PLACE = ROOT / ".cache" / "bench"  # everything that benchmarks make
RESULTS = PLACE / "results"  # what the workflow makes of config.yaml, once

sys.path.insert(0, str(SCRIPTS))

from eora import commands, manifest, stages  # noqa: E402 - neither imports torch

# One of each, in benchmarks/config.yaml.
MODEL, COMPRESSION, CALIBRATION, ADAPTER, TASK = (
    "smollm2-135m",
    "w2g32",
    "moments",
    "eora",
    "perplexity",
)

Json = Annotated[
    Path | None, typer.Option("--json", help="Write the figures and targets here as well.")
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Calibration samples of 512 tokens; fewer than 64 only to try the benchmark out.",
        show_default="64, as benchmarks/config.yaml has it",
    ),
]


@dataclass(frozen=True)
class Target:
    """A figure and what it is to be: at least ``least``, or at most ``most``."""

    name: str
    figure: float
    least: float | None = None
    most: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is; a figure that is no number is not."""
        if self.least is not None:
            return self.figure >= self.least
        return self.figure <= self.most

    def line(self) -> str:
        """Name, figure, target, met or not."""
        bound, limit = (">=", self.least) if self.least is not None else ("<=", self.most)
        return (
            f"{self.name:<58} {self.figure:>9.3g}{self.unit:<3} "
            f"{bound} {limit:>7.3g}{self.unit:<3} {'met' if self.met else 'NOT MET'}"
        )

    def row(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "met": self.met}


def conclude(targets: Iterable[Target], figures: Any, path: Path | None) -> None:
    """Print a line for each target; write them with all figures to ``path``, if given."""
    targets = list(targets)
    typer.echo()
    for target in targets:
        typer.echo(target.line())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"targets": [target.row() for target in targets], "figures": figures}
        path.write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        wall: seconds, from its start to its end.
        peak: most bytes resident at once, with the pages of files that it maps.
        anonymous: the same without those pages (sampled; 0 where the system does not tell).
    """

    wall: float
    peak: int
    anonymous: int

    def __add__(self, after: Cost) -> Cost:
        """Of this process and one after it."""
        return Cost(
            self.wall + after.wall,
            max(self.peak, after.peak),
            max(self.anonymous, after.anonymous),
        )


def _anonymous(process: int) -> int:
    """Bytes of the process' memory that no file backs, now."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run(command: list[Any], log: Path, **environment: str) -> Cost:
    """Run a command to its end and measure it; what it prints goes to ``log``.

    Linux counts what the caller has resident towards the peak of what it starts, so callers keep
    torch out of their own process. It runs in :data:`PLACE`, as some leave files where they run.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=PLACE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
        anonymous = 0
        try:
            while True:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if done:
                    break
                anonymous = max(anonymous, _anonymous(process.pid))
                time.sleep(0.02)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(
            f"{tail}\n\n{' '.join(map(str, command))}\nfailed; all it said is in {log}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_maxrss * unit, anonymous)


def load() -> dict[str, Any]:
    """benchmarks/config.yaml, checked, with defaults filled in."""
    return commands.load_config(ROOT / "benchmarks/config.yaml")


def prepare(samples: int | None = None) -> dict[str, Any]:
    """Make the model, its 2-bit form, calibration tokens and held-out text, where they are missing.

    They lie in :data:`RESULTS` and are made by the workflow itself, as a user's are.

    Args:
        samples: calibration samples, if not as many as benchmarks/config.yaml says.

    Returns:
        The config, checked, with defaults filled in.
    """
    config = load()
    if samples is not None:
        config["calibrations"][CALIBRATION]["samples"] = samples
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / "config.json"
    file.write_text(json.dumps(config, indent=1))
    wanted = [
        stages.place("compress", model=MODEL, compression=COMPRESSION),
        stages.place("tokenize", model=MODEL, calibration=CALIBRATION),
        stages.place("download_dataset", dataset=config["tasks"][TASK]["perplexity"]),
    ]
    typer.echo("Making the 2-bit model and the tokens, where they are missing (10 min) ...")
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile"]
    command += ["--directory", PLACE, "--configfile", file, "--cores", os.cpu_count(), "--"]
    command += [f"{config['results']}/{place.folder}/{manifest.NAME}" for place in wanted]
    run(command, PLACE / "logs" / "prepare.log")
    return config


def result(stage: str, **wildcards: Any) -> Path:
    """The folder of one of the results that :func:`prepare` makes."""
    return RESULTS / stages.place(stage, **wildcards).folder


def stage(
    config: dict[str, Any], name: str, out: Path, arguments: list[Any], **wildcards: Any
) -> Cost:
    """Run a stage's script with the parameters that the workflow gives it, and measure it.

    Args:
        config: as :func:`prepare` returns it.
        name: the stage, and its script's name.
        out: folder for its result.
        arguments: its inputs, as the script takes them.
        wildcards: of the stage's folder in the workflow.
    """
    made = {key: str(value) for key, value in wildcards.items()}
    params = manifest.canonical(stages.params(config, name, made))
    command = [sys.executable, SCRIPTS / f"{name}.py", "--params", params, *arguments, "--out", out]
    return run(command, PLACE / "logs" / f"{name}-{out.name}.log")


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:,.0f} MB"
