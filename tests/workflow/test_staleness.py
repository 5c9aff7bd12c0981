"""Edit one key after a full run and compare the exact set of jobs: each of the schema's keys."""

import copy
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import yaml

from conftest import ROOT, copy_whole, failures, make_model, make_questions
from eora import adapters, export, stages
from eora import config as cfg

Job = tuple[str, frozenset[tuple[str, str]]]  # rule, and its wildcards by name
REPORT: Job = ("report", frozenset())

# --- What a config consists of, told once more, so that the workflow is compared with this. ---


def job(rule: str, **wildcards: Any) -> Job:
    return rule, frozenset((key, str(value)) for key, value in wildcards.items())


def every_job(config: dict[str, Any]) -> set[Job]:
    """All jobs of a config in which every entry is used; evaluations with what they judge."""
    found = {job("report")} | {job("download_dataset", dataset=d) for d in config["datasets"]}
    found |= {job("prepare_task", task=t) for t, e in config["tasks"].items() if "lm_eval" in e}
    for model in config["models"]:
        found |= {job("download_model", model=model), job("check_model", model=model)}
        found |= {job("tokenize", model=model, calibration=c) for c in config["calibrations"]}
        found |= {job("evaluate", model=model, task=task) for task in config["tasks"]}
        for compression, entry in config["compressions"].items():
            if entry.get("model", model) == model:
                found |= set(jobs_of_compression(config, model=model, compression=compression))
    return found


def shards_of(config: dict[str, Any]) -> list[dict[str, int]]:
    shards = config.get("covariance", {}).get("shards", 1)
    return [{"shard": shard, "shards": shards} for shard in range(shards)]


def jobs_of_compression(config: dict[str, Any], **names: str) -> Iterator[Job]:
    yield job("compress", **names)
    if "checkpoint" in config["compressions"][names["compression"]]:
        yield job("download_checkpoint", **names)
    entry = config["compressions"][names["compression"]]
    if around := entry.get("around"):  # it is made from an adapter, and not judged without one
        inner = {key: around[key] for key in ("compression", "adapter", "rank")}
        yield job("adapter", model=names["model"], **inner)
        if around["bits"] != 16:
            yield job("quantize_adapter", model=names["model"], **inner, bits=around["bits"])
        fitted = {"model": names["model"], "adapter": around["adapter"]}
        for part in shards_of(config):
            yield job("decompose", **fitted, compression=around["compression"], **part)
    elif entry.get("method") != "rescale":  # nor are scales that were fitted beside one
        yield from (job("evaluate", **names, task=task) for task in config["tasks"])
    for adapter, entry in config["adapters"].items():
        if names["compression"] not in entry.get("compressions", config["compressions"]):
            continue
        for part in shards_of(config):
            inputs = {"model": names["model"], "calibration": entry["calibration"], **part}
            if entry.get("calibrate_on") == "compressed":
                inputs["compression"] = names["compression"]
                yield job("compressed_covariance", **inputs)
            else:
                yield job("covariance", **inputs)
            yield job("decompose", **names, adapter=adapter, **part)
        for rank in entry["ranks"]:
            made = {**names, "adapter": adapter, "rank": rank}
            yield job("adapter", **made)
            for bits in entry["bits"]:
                if bits != 16:
                    yield job("quantize_adapter", **made, bits=bits)
                for task in config["tasks"]:
                    yield job("evaluate", **made, bits=bits, task=task)
            if "tune" in entry:
                yield job("tune_adapter", **made)


AFTER_DECOMPOSE = ("decompose", "adapter", "quantize_adapter", "evaluate")
AFTER_COMPRESS = ("compress", "compressed_covariance", *AFTER_DECOMPOSE)


def some(*rules: str, **wildcards: str) -> Callable[[Job], bool]:
    """Whether a job is one of these rules (any, if none is named) and has these wildcards.

    A wildcard's value is a regular expression.
    """

    def is_one(found: Job) -> bool:
        rule, names = found[0], dict(found[1])
        return (not rules or rule in rules) and all(
            re.fullmatch(value, names.get(key, "")) for key, value in wildcards.items()
        )

    return is_one


# --- What the workflow plans. ---

VARIANT = re.compile(
    r"original|(?P<compression>[^+]+)(\+(?P<adapter>.+)-r(?P<rank>\d+)-(?P<bits>\d+)bit)?"
)
MESSAGES = {
    "download_model": r"Fetching model (?P<model>\S+)",
    "download_checkpoint": r"Fetching checkpoint (?P<compression>\S+) of (?P<model>\S+)",
    "download_dataset": r"Fetching data set (?P<dataset>\S+)",
    "prepare_task": r"Preparing task (?P<task>\S+)",
    "check_model": r"Checking model (?P<model>\S+)",
    "tokenize": r"Tokenizing (?P<calibration>\S+) for (?P<model>\S+)",
    "compress": r"Compressing (?P<model>\S+) to (?P<compression>\S+)",
    "covariance": r"Second moments of (?P<model>\S+) on (?P<calibration>\S+),"
    r" shard (?P<shard>\d+) of (?P<shards>\d+)",
    "compressed_covariance": r"Second moments of (?P<model>\S+) (?P<compression>\S+)"
    r" on (?P<calibration>\S+), shard (?P<shard>\d+) of (?P<shards>\d+)",
    "decompose": r"Decomposing the error of (?P<model>\S+) (?P<compression>\S+)"
    r" for (?P<adapter>\S+), shard (?P<shard>\d+) of (?P<shards>\d+)",
    "adapter": r"Adapter (?P<adapter>\S+) of rank (?P<rank>\d+)"
    r" for (?P<model>\S+) (?P<compression>\S+)",
    "quantize_adapter": r"Rounding adapter (?P<adapter>\S+) of rank (?P<rank>\d+)"
    r" for (?P<model>\S+) (?P<compression>\S+) to (?P<bits>\d+) bits",
    "tune_adapter": r"Fine-tuning adapter (?P<adapter>\S+) of rank (?P<rank>\d+)"
    r" for (?P<model>\S+) (?P<compression>\S+)",
    "evaluate": r"Judging (?P<model>\S+) (?P<variant>\S+) by (?P<task>\S+)",
    "report": r"Writing the report",
}


def told_job(rule: str, **names: str) -> Job:
    """A job with its variant taken apart."""
    if "variant" in names:
        parts = VARIANT.fullmatch(names.pop("variant")).groupdict()
        names |= {key: value for key, value in parts.items() if value is not None}
    return job(rule, **names)


def read_dry_run(output: str) -> set[Job]:
    found = set()
    for message in re.findall(r"^Job \d+: (.*)$", output, re.MULTILINE):
        for rule, pattern in MESSAGES.items():
            if match := re.fullmatch(pattern, message):
                found.add(told_job(rule, **match.groupdict()))
                break
        else:
            assert message == "All that the config asks for"
    assert bool(found) != ("Nothing to be done" in output)
    return found


def read_status(output: str) -> tuple[set[Job], list[str]]:
    """The jobs that `status --json` says will run, and all reasons that it gives."""
    jobs = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = set()
    for entry in (entry for entry in jobs if entry["runs"]):
        place = stages.place_of(entry["folder"])
        names = dict(place.wildcards) if place and entry["rule"] != "report" else {}
        found.add(told_job(entry["rule"], **names))
    assert all(entry["runs"] == (entry["state"] in RUNS) for entry in jobs)
    return found, [why for entry in jobs if entry["state"] == "stale" for why in entry["why"]]


RUNS = ("missing", "stale", "follows")


def plan(pipeline, config=None) -> tuple[set[Job], list[str]]:
    """The jobs that a dry run lists, which `status` must agree with, and status's reasons."""
    file = pipeline.write(config)
    dry = pipeline.start(*pipeline.command(file, "--dry-run"))
    seen, reasons = told_by_status(pipeline, file)
    output = dry.communicate()[0]
    assert dry.returncode == 0, output[-3000:]
    assert seen == read_dry_run(output)
    return seen, reasons


def told_by_status(pipeline, file) -> tuple[set[Job], list[str]]:
    """The jobs that `status` names, which are those of Snakemake's own summary, and its reasons."""
    script = pipeline.root / "scripts/status.py"
    status = pipeline.start(sys.executable, script, "--config", file, "--json")
    told = status.communicate()[0]
    assert status.returncode == 0, told[-3000:]
    return read_status(told)


# --- The table: one row for each key of the schema. ---


def put(path: str, value: Any, config: dict[str, Any]) -> None:
    """Set a key, given by its path with slashes."""
    *above, last = path.split("/")
    for key in above:
        config = config.setdefault(key, {})
    config[int(last) if isinstance(config, list) else last] = value


def edit(*changes: tuple[str, Any]) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for path, value in changes:
            put(path, value, config)

    return change


def rename(section: str, old: str, new: str, *references: str) -> Callable:
    def change(config: dict[str, Any]) -> None:
        config[section] = {new if k == old else k: v for k, v in config[section].items()}
        for path in references:
            put(path, new, config)

    return change


def drop(section: str, name: str) -> Callable:
    return lambda config: config[section].pop(name)


WHEEL = {"wheel": "other==1", "sha256": "0" * 64, "member": "m"}
HUB = {"hub": "tiny/other", "revision": "f" * 40}
GPTQ = {"method": "gptq", "bits": 3, "group_size": 32, "calibration": "rounding"}
CALIBRATION = {"dataset": "sentences", "samples": 5, "seqlen": 32}


def of_model(model: str) -> Callable[[Job], bool]:
    """All that follows from a model; a checkpoint's files are what they are."""
    return lambda found: found[0] != "download_checkpoint" and some(model=model)(found)


OF_TINY = [of_model("tiny")]
OF_TWIN = [some(model="twin")]
JUDGED_CHOICE = [some("evaluate", task="choice")]
JUDGED_TEXT = [some("evaluate", task="text")]
# What follows from the data that AutoRound sees, and from those that the moments are taken on.
ROUNDING = [some("tokenize", calibration="rounding"), some(*AFTER_COMPRESS, compression="w2")]
ALL_FITTED = [some(*AFTER_DECOMPOSE, adapter=".+")]
COVARIANCES = [some("covariance", "compressed_covariance"), *ALL_FITTED]
MOMENTS = [some("tokenize", calibration="moments"), *COVARIANCES]
OF_MORE = [some("download_dataset", dataset="more"), *MOMENTS]
OF_SENTENCES = [some("download_dataset", dataset="sentences"), *ROUNDING, *JUDGED_TEXT]
OF_W2 = [some(*AFTER_COMPRESS, compression="w2")]
OF_W4 = [some("download_checkpoint", *AFTER_COMPRESS, compression="w4")]
FITTED = [some(*AFTER_DECOMPOSE, adapter="eora")]
TUNED = [some("tune_adapter"), some("evaluate", adapter="eora")]
NOTHING: list = []


@dataclass
class Row:
    """A change and the jobs that it must start: those of ``again``, and those that are new.

    The report is written again with any of them, and with ``report``.
    """

    change: Callable[[dict[str, Any]], Any]
    again: list[Callable[[Job], bool]]
    report: bool = False
    why: str | None = None  # what status must name; the key itself where None


INNER = {"bits": 2, "group_size": 32, "iters": 1, "calibration": "rounding"}
AROUND = {"compression": "inner", "adapter": "eora", "rank": 4, "bits": 3}
RESCALED = {"method": "rescale", "compression": "inner", "calibration": "moments", "rank": 4}
TABLE = {
    "results": Row(edit(("results", "elsewhere")), [some()]),
    "models.*.hub": Row(edit(("models/twin/hub", "tiny/other")), OF_TWIN),
    "models.*.revision": Row(edit(("models/twin/revision", "f" * 40)), OF_TWIN),
    "models.*.wheel": Row(edit(("models/tiny", WHEEL)), OF_TINY),
    "models.*.sha256": Row(edit(("models/tiny", WHEEL | {"sha256": "1" * 64})), OF_TINY),
    "models.*.member": Row(edit(("models/tiny", WHEEL | {"member": "n"})), OF_TINY),
    "models.*.path": Row(edit(("models/tiny/path", "sources/other")), OF_TINY),
    "models.*.dtype": Row(edit(("models/twin/dtype", "float16")), NOTHING),
    "models.*.trust_remote_code": Row(
        edit(("models/tiny/trust_remote_code", True)), [some(model="tiny")]
    ),
    "datasets.*.hub": Row(edit(("datasets/more/hub", "tiny/other")), OF_MORE),
    "datasets.*.revision": Row(edit(("datasets/more/revision", "f" * 40)), OF_MORE),
    "datasets.*.name": Row(edit(("datasets/more/name", "en")), OF_MORE),
    "datasets.*.data_files": Row(edit(("datasets/more/data_files", "en/*")), OF_MORE),
    "datasets.*.split": Row(edit(("datasets/more/split", "train")), OF_MORE),
    "datasets.*.wheel": Row(edit(("datasets/sentences/wheel", "data-pack==2.0")), OF_SENTENCES),
    "datasets.*.sha256": Row(edit(("datasets/sentences/sha256", "0" * 64)), OF_SENTENCES),
    "datasets.*.member": Row(edit(("datasets/sentences/member", "data_pack")), OF_SENTENCES),
    "datasets.*.distinct": Row(edit(("datasets/sentences/distinct", "sentence")), OF_SENTENCES),
    "datasets.*.rows": Row(edit(("datasets/sentences/rows", [0, 90])), OF_SENTENCES),
    "datasets.*.text": Row(edit(("datasets/sentences/text", "other")), ROUNDING + JUDGED_TEXT),
    "datasets.*.path": Row(
        edit(("datasets/questions/path", "sources/others.jsonl")),
        [some("download_dataset", dataset="questions"), *JUDGED_CHOICE],
    ),
    "calibrations.*.dataset": Row(edit(("calibrations/moments/dataset", "sentences")), MOMENTS),
    "calibrations.*.samples": Row(edit(("calibrations/moments/samples", 10)), MOMENTS),
    "calibrations.*.seqlen": Row(edit(("calibrations/rounding/seqlen", 24)), ROUNDING),
    "calibrations.*.layout": Row(edit(("calibrations/moments/layout", "packed")), MOMENTS),
    "compressions.*.bits": Row(edit(("compressions/w2/bits", 3)), OF_W2),
    "compressions.*.calibration": Row(
        edit(("calibrations/c", CALIBRATION), ("compressions/w2/calibration", "c")), OF_W2
    ),
    "compressions.*.group_size": Row(edit(("compressions/w2/group_size", 16)), OF_W2),
    "compressions.*.sym": Row(edit(("compressions/w2/sym", True)), OF_W2),
    "compressions.*.iters": Row(edit(("compressions/w2/iters", 2)), OF_W2),
    "compressions.*.batch_size": Row(edit(("compressions/w2/batch_size", 2)), OF_W2),
    "compressions.*.format": Row(
        edit(("compressions/w2/format", "auto_gptq"), ("compressions/w2/sym", True)), OF_W2
    ),
    "compressions.*.alg_ext": Row(edit(("compressions/w2/alg_ext", True)), OF_W2),
    "compressions.*.keep": Row(edit(("compressions/w2/keep", ["down_proj"])), OF_W2),
    "compressions.*.seed": Row(edit(("compressions/w2/seed", 7)), OF_W2),
    "compressions.*.method": Row(edit(("compressions/w2", GPTQ)), OF_W2),
    "compressions.*.sparsity": Row(
        edit(("compressions/w2", GPTQ | {"method": "wanda", "sparsity": "0.5"})), OF_W2
    ),
    "compressions.*.model": Row(edit(("compressions/w4/model", "twin")), NOTHING, why=""),
    "compressions.*.checkpoint.hub": Row(edit(("compressions/w4/checkpoint", HUB)), OF_W4),
    "compressions.*.checkpoint.revision": Row(edit(("compressions/w4/checkpoint", HUB)), OF_W4),
    "compressions.*.checkpoint.wheel": Row(edit(("compressions/w4/checkpoint", WHEEL)), OF_W4),
    "compressions.*.checkpoint.sha256": Row(edit(("compressions/w4/checkpoint", WHEEL)), OF_W4),
    "compressions.*.checkpoint.member": Row(edit(("compressions/w4/checkpoint", WHEEL)), OF_W4),
    "compressions.*.checkpoint.path": Row(
        edit(("compressions/w4/checkpoint/path", "sources/other")), OF_W4
    ),
    **{
        f"compressions.*.around.{key}": Row(
            edit(("compressions/inner", INNER), ("compressions/w2/around", AROUND)),
            OF_W2,
            why=rf"compressions\.w2\.around\.{key}: - -> ",
        )
        for key in AROUND
    },
    "compressions.*.compression": Row(
        edit(("compressions/inner", INNER), ("compressions/w2", RESCALED)), OF_W2
    ),
    "compressions.*.rank": Row(
        edit(("compressions/inner", INNER), ("compressions/w2", RESCALED | {"rank": 5})), OF_W2
    ),
    "compressions.*.rounds": Row(
        edit(("compressions/inner", INNER), ("compressions/w2", RESCALED | {"rounds": 3})), OF_W2
    ),
    "adapters.*.calibration": Row(edit(("adapters/eora/calibration", "rounding")), FITTED),
    "adapters.*.ranks": Row(edit(("adapters/eora/ranks", [4, 8, 12])), NOTHING, why=""),
    "adapters.*.compressions": Row(
        edit(("adapters/eora/compressions", ["w4", "w2"])), NOTHING, why=""
    ),
    "adapters.*.max_rank": Row(edit(("adapters/eora/max_rank", 24)), FITTED),
    "adapters.*.bits": Row(edit(("adapters/eora/bits", [16, 4, 3])), NOTHING, why=""),
    "adapters.*.group_size": Row(
        edit(("adapters/eora/group_size", 16)),
        [some("quantize_adapter"), some("evaluate", bits="4")],
    ),
    "adapters.*.method": Row(edit(("adapters/eora/method", "svd")), FITTED),
    "adapters.*.calibrate_on": Row(edit(("adapters/eora/calibrate_on", "compressed")), FITTED),
    "adapters.*.tune.calibration": Row(edit(("adapters/eora/tune/calibration", "moments")), TUNED),
    "adapters.*.tune.steps": Row(edit(("adapters/eora/tune/steps", 3)), TUNED),
    "adapters.*.tune.batch_size": Row(edit(("adapters/eora/tune/batch_size", 3)), TUNED),
    "adapters.*.tune.learning_rate": Row(edit(("adapters/eora/tune/learning_rate", 0.1)), TUNED),
    "adapters.*.tune.start": Row(edit(("adapters/eora/tune/start", "zero")), TUNED),
    "adapters.*.tune.seed": Row(edit(("adapters/eora/tune/seed", 7)), TUNED),
    "tasks.*.lm_eval": Row(
        edit(("tasks/choice/lm_eval", "arc_challenge")),
        [some("prepare_task", task="choice"), *JUDGED_CHOICE],
    ),
    "tasks.*.dataset": Row(edit(("tasks/choice/dataset", "sentences")), JUDGED_CHOICE),
    "tasks.*.fewshot_dataset": Row(
        edit(("tasks/choice/fewshot_dataset", "sentences")), JUDGED_CHOICE
    ),
    "tasks.*.num_fewshot": Row(edit(("tasks/choice/num_fewshot", 2)), JUDGED_CHOICE),
    "tasks.*.limit": Row(edit(("tasks/choice/limit", 7)), JUDGED_CHOICE),
    "tasks.*.chat_template": Row(edit(("tasks/choice/chat_template", True)), JUDGED_CHOICE),
    "tasks.*.perplexity": Row(edit(("tasks/text/perplexity", "more")), JUDGED_TEXT),
    "tasks.*.window": Row(edit(("tasks/text/window", 16)), JUDGED_TEXT),
    "tasks.*.windows": Row(edit(("tasks/text/windows", 3)), JUDGED_TEXT),
    "tasks.*.join": Row(edit(("tasks/text/join", "\n\n")), JUDGED_TEXT),
    "tasks.*.batch_size": Row(edit(("tasks/choice/batch_size", 2)), NOTHING),
    "tasks.*.metric": Row(edit(("tasks/choice/metric", "acc")), NOTHING, report=True, why=""),
    "covariance.shards": Row(
        edit(("covariance/shards", 3)),
        [some("adapter", "quantize_adapter"), some("evaluate", adapter=".+")],
        why="",
    ),
    "covariance.tf32": Row(
        edit(("covariance/tf32", True)),
        COVARIANCES,
        why=r"covariance\.tf32: false -> true",
    ),
    "covariance.expert_tokens": Row(
        edit(("covariance/expert_tokens", 100)),
        COVARIANCES,
        why=r"covariance\.expert_tokens: 512 -> 100",
    ),
    "runtime.device": Row(edit(("runtime/device", "auto")), NOTHING),
    "runtime.batch_size": Row(edit(("runtime/batch_size", 3)), NOTHING),
    "runtime.threads": Row(edit(("runtime/threads", 2)), NOTHING),
    "runtime.store": Row(edit(("runtime/store", False)), NOTHING),
}


def schema_keys(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    """The schema's keys, dotted, those of named entries below a star."""
    for key, below in schema.get("properties", {}).items():
        if below.get("type") != "object":
            yield f"{above}{key}"
        yield from schema_keys(below, f"{above}{key}.")
        if isinstance(below.get("additionalProperties"), dict):
            yield from schema_keys(below["additionalProperties"], f"{above}{key}.*.")


def test_every_key_of_the_schema_has_a_row():
    schema = cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    assert set(schema_keys(schema)) == set(TABLE)


@pytest.fixture(scope="module")
def others(pipeline):
    """Other local sources that rows name; their paths are relative to the working directory."""
    make_model(pipeline.folder / "sources/other", seed=2)
    make_questions(pipeline.folder / "sources/others.jsonl")


def check(pipeline, row: Row, dry_run: bool = True) -> list[str]:
    """Plan the changed config; assert its jobs; return the reasons that status gives."""
    config = copy.deepcopy(pipeline.config)
    row.change(config)
    before, after = every_job(pipeline.config), every_job(config)
    expected = {found for found in after if any(is_one(found) for is_one in row.again)}
    expected |= after - before
    if expected or row.report or before - after:
        expected.add(REPORT)
    if dry_run:
        jobs, reasons = plan(pipeline, config)
    else:
        jobs, reasons = told_by_status(pipeline, pipeline.write(config))
    assert jobs == expected
    return reasons


@pytest.fixture
def tuned(pipeline, tmp_path):
    """The pipeline with its adapter fine-tuned, of one model and compression."""
    folder = tmp_path / "clone"
    copy_whole(pipeline.folder, folder)
    config = copy.deepcopy(pipeline.config)
    del config["models"]["twin"], config["compressions"]["w4"], config["tasks"]["choice"]
    del config["datasets"]["questions"], config["adapters"]["svd"]
    tune = {"calibration": "rounding", "steps": 2, "batch_size": 2}
    config["adapters"]["eora"] |= {"ranks": [8], "bits": [16], "tune": tune}
    flow = replace(pipeline, folder=folder, config=config)
    done = flow.snakemake()
    assert done.returncode == 0, failures(done.stdout, folder)
    return flow


TUNE = [key for key in TABLE if ".tune." in key]


def test_an_adapter_is_fine_tuned(tuned, tmp_path):
    """What was fitted stays; each key of it, and its stage's version, make it anew."""
    made = tuned.results / "adapters/tiny/w2/eora"
    whole = adapters.load_peft(made / "r8-tuned/adapter")
    for name, (_, b) in adapters.load_peft(made / "r8-16bit/adapter").items():
        assert b.shape == whole[name][1].shape and not torch.equal(b, whole[name][1])
    losses = json.loads((made / "r8-tuned/losses.json").read_text())
    assert [entry["step"] for entry in losses] == [1, 2]
    assert not list(made.glob("r8-tuned/.progress-*"))
    assert "Losses of fine-tuning" in (tuned.results / "report.html").read_text()
    card = export.card(export.facts(export.Source.of(made / "r8-tuned")))
    assert "then fine-tuned for 2 steps of 2 samples" in card
    assert "not trained" not in card
    for key in TUNE:
        check_key(tuned, key)
    (tmp_path / "raised").mkdir()
    check_version(tuned, tmp_path / "raised", "tune_adapter", TUNED)


@pytest.mark.parametrize("key", [key for key in TABLE if key not in TUNE])
def test_one_key(pipeline, others, key):
    check_key(pipeline, key)


def check_key(pipeline, key):
    """A row of the table, told by status alone, and that status names the key."""
    row = TABLE[key]
    reasons = check(pipeline, row, dry_run=False)  # which agrees with status in the rows below
    if row.again and key != "results":
        section, _, last = key.replace("*", "entry").partition(".entry.")
        why = row.why if row.why is not None else rf"{section}\.\w+\.{last}: "
        assert any(re.match(why, reason) for reason in reasons), reasons


CHANGES = {
    "nothing": Row(edit(), NOTHING),
    "a default is written out": Row(
        edit(
            ("models/twin/trust_remote_code", False),
            ("datasets/more/text", "text"),
            ("calibrations/rounding/layout", "packed"),
            ("compressions/w2/sym", False),
            ("compressions/w2/seed", 42),
            ("compressions/w2/keep", []),
            ("adapters/eora/method", "eora"),
            ("adapters/eora/group_size", 32),
            ("tasks/choice/chat_template", False),
            ("runtime/batch_size", 8),
        ),
        NOTHING,
    ),
    # Snakemake compares params as a set of values without names.
    "two values are swapped": Row(
        edit(("compressions/w2/iters", 8), ("compressions/w2/batch_size", 1)), OF_W2
    ),
    "two other values are swapped": Row(
        edit(("tasks/text/window", 4), ("tasks/text/windows", 32)), JUDGED_TEXT
    ),
    "a calibration becomes a mix": Row(
        edit(
            (
                "calibrations/moments",
                {"mix": {"more": 0.75, "sentences": 0.25}, "samples": 12, "seqlen": 24},
            )
        ),
        MOMENTS,
    ),
    "two entries are swapped": Row(
        lambda config: config["compressions"].update(
            w2=config["compressions"]["w4"], w4=config["compressions"]["w2"]
        ),
        OF_W2 + OF_W4,
    ),
    "a path to the same files elsewhere": Row(
        edit(("datasets/questions/path", "sources/moved/questions.jsonl")), NOTHING
    ),
    "a model more": Row(edit(("models/more", {"path": "sources/other"})), NOTHING),
    "a compression more: no covariance pass": Row(
        edit(
            (
                "compressions/w3",
                {"bits": 3, "group_size": 32, "iters": 1, "calibration": "rounding"},
            )
        ),
        NOTHING,
    ),
    "a task more": Row(edit(("tasks/short", {"perplexity": "sentences", "window": 16})), NOTHING),
    "an adapter more, on the same moments": Row(
        edit(
            (
                "adapters/diagonal",
                {"calibration": "moments", "ranks": [4], "bits": [16], "method": "diagonal"},
            )
        ),
        NOTHING,
    ),
    "a model is renamed": Row(rename("models", "twin", "other"), NOTHING),
    "a data set is renamed": Row(
        rename(
            "datasets", "sentences", "s", "calibrations/rounding/dataset", "tasks/text/perplexity"
        ),
        ROUNDING + JUDGED_TEXT,
    ),
    "a calibration is renamed": Row(
        rename(
            "calibrations", "moments", "m", "adapters/eora/calibration", "adapters/svd/calibration"
        ),
        ALL_FITTED,
    ),
    "a compression is renamed": Row(
        rename("compressions", "w2", "two", "adapters/eora/compressions/0"), NOTHING
    ),
    "an adapter is renamed": Row(rename("adapters", "eora", "e"), NOTHING),
    "a task is renamed": Row(rename("tasks", "text", "t"), NOTHING),
    "a model less": Row(drop("models", "twin"), NOTHING),
    "a compression less": Row(
        lambda config: (config["compressions"].pop("w4"), config["adapters"].pop("svd")), NOTHING
    ),
    "a task less": Row(drop("tasks", "text"), NOTHING),
    "a rank less": Row(edit(("adapters/eora/ranks", [8])), NOTHING),
    "bits less": Row(edit(("adapters/eora/bits", [16])), NOTHING),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_change(pipeline, others, name):
    moved = pipeline.folder / "sources/moved"
    moved.mkdir(exist_ok=True)
    shutil.copyfile(pipeline.folder / "sources/questions.jsonl", moved / "questions.jsonl")
    check(pipeline, CHANGES[name])


def test_comments_and_key_order(pipeline):
    config = {key: pipeline.config[key] for key in reversed(pipeline.config)}
    file = pipeline.folder / "reordered.yaml"
    file.write_text("# a comment\n" + yaml.safe_dump(config, sort_keys=False))
    process = pipeline.start(*pipeline.command(file, "--dry-run"))
    assert read_dry_run(process.communicate()[0]) == set()


VERSIONS = {
    "download_model": [of_model(".+")],
    "download_checkpoint": OF_W4,
    "download_dataset": [some("download_dataset"), *ROUNDING, *MOMENTS, some("evaluate")],
    "prepare_task": [some("prepare_task"), *JUDGED_CHOICE],
    "tokenize": [*ROUNDING, *MOMENTS],
    "compress": [some(*AFTER_COMPRESS, compression=".+")],
    "covariance": COVARIANCES,
    "decompose": ALL_FITTED,
    "adapter": [some("adapter", "quantize_adapter"), some("evaluate", adapter=".+")],
    "quantize_adapter": [some("quantize_adapter"), some("evaluate", bits="4")],
    "evaluate": [some("evaluate")],
    "report": [],
}


def test_every_stage_has_a_version():
    assert {*VERSIONS, "compressed_covariance", "tune_adapter"} == {*stages.STAGES, "report"}


@pytest.mark.parametrize("stage", VERSIONS)
def test_a_stages_version_is_raised(pipeline, tmp_path, stage):
    check_version(pipeline, tmp_path, stage, VERSIONS[stage])


def check_version(pipeline, checkout, stage, again):
    """A checkout in which a stage's version is the next makes these jobs anew."""
    for name in ("Snakefile", "workflow", "profiles", "scripts", "envs"):
        source = ROOT / name
        copier = shutil.copytree if source.is_dir() else shutil.copyfile
        copier(source, checkout / name)
    raised = checkout / "scripts/eora/stages.py"
    shared = {"report": "REPORT_VERSION =", "covariance": "_COVARIANCE_VERSION ="}
    place = shared.get(stage, rf'"{stage}": Stage\([^,]*,')
    text = raised.read_text()
    (number,) = re.finditer(rf"{place}\s+(\d+)\b", text)
    version = int(number[1])
    raised.write_text(f"{text[: number.start(1)]}{version + 1}{text[number.end(1) :]}")
    there = copy.copy(pipeline)
    there.root = checkout
    expected = {
        found for found in every_job(pipeline.config) if any(is_one(found) for is_one in again)
    }
    jobs, reasons = told_by_status(there, there.write())
    assert jobs == expected | {REPORT}
    assert stage == "report" or f"version of stage {stage}: {version} -> {version + 1}" in reasons


@pytest.mark.parametrize("how", ["copied", "touched"])
def test_touching_or_copying_results(pipeline, tmp_path, how):
    clone = pipeline.copy(tmp_path / "copy")
    if how == "touched":
        now = time.time()
        for i, path in enumerate(sorted(clone.results.rglob("*"), reverse=True)):
            os.utime(path, (now - i, now - i))
    assert plan(clone)[0] == set()


def test_a_local_files_content_is_seen_whatever_its_time(pipeline):
    file = pipeline.folder / "sources/questions.jsonl"
    stamp, before = file.stat(), file.read_text()
    try:
        file.write_text(before.replace("hill", "mill"))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        jobs, reasons = plan(pipeline)
        rows = [some("download_dataset", dataset="questions"), *JUDGED_CHOICE]
        everything = every_job(pipeline.config)
        assert jobs == {j for j in everything if any(row(j) for row in rows)} | {REPORT}
        assert "datasets.questions.path: questions.jsonl was changed" in reasons
    finally:
        file.write_text(before)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


LOST = {
    "models/twin": OF_TWIN,
    "datasets/more": OF_MORE,
    "tasks/choice": [some("prepare_task"), *JUDGED_CHOICE],
    "tokens/tiny/rounding": [
        some("tokenize", model="tiny", calibration="rounding"),
        some(*AFTER_COMPRESS, model="tiny", compression="w2"),
    ],
    "checkpoints/tiny/w4": OF_W4,
    "compressed/tiny/w2": [some(*AFTER_COMPRESS, model="tiny", compression="w2")],
    # The hidden states that the last shard starts from are gone: the first makes them again.
    "covariance/tiny/moments/1-of-2": [
        some("covariance", model="tiny"),
        some(*AFTER_DECOMPOSE, model="tiny", adapter="eora"),
    ],
    "decompositions/tiny/w2/eora/0-of-2": [
        some("decompose", model="tiny", compression="w2", shard="0"),
        some(*AFTER_DECOMPOSE[1:], model="tiny", compression="w2", adapter="eora"),
    ],
    "adapters/tiny/w2/eora/r4-16bit": [
        some(*AFTER_DECOMPOSE[1:], model="tiny", compression="w2", rank="4")
    ],
    "adapters/tiny/w2/eora/r4-16bit/adapter": [
        some(*AFTER_DECOMPOSE[1:], model="tiny", compression="w2", rank="4")
    ],
    "evaluations/tiny/original/text": [some("evaluate", model="tiny", task="text")],
    "evaluations/tiny/original/text/results.json": [some("evaluate", model="tiny", task="text")],
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_result_is_made_again_with_what_follows(pipeline, tmp_path, lost):
    clone = pipeline.copy(tmp_path / "copy")
    path = clone.results / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = {
        found
        for found in every_job(pipeline.config)
        if any(is_one(found) for is_one in LOST[lost])
        and not (lost.startswith("evaluations") and "compression" in dict(found[1]))
    }
    assert told_by_status(clone, clone.write())[0] == expected | {REPORT}


def test_room_can_be_made_by_deleting_what_is_only_a_step(pipeline, tmp_path):
    """While its manifest is there, a big folder is missed only when something needs it."""
    clone = pipeline.copy(tmp_path / "copy")
    for folder in clone.results.glob("decompositions/*/*/*/*/factors"):
        shutil.rmtree(folder)
    assert plan(clone)[0] == set()
    config = copy.deepcopy(pipeline.config)
    put("adapters/eora/ranks", [4, 8, 12], config)
    is_of_it = some("decompose", adapter="eora")
    decompositions = {found for found in every_job(config) if is_of_it(found)}
    assert decompositions <= plan(clone, config)[0]
