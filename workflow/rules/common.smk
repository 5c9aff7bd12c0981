# Config validation, and the names, parameters and targets that all stages share.
#
# Staleness: a stage gets its configuration as ONE tracked param, canonical JSON with exactly the
# keys that change its result and the stage's version (eora.stages says which). Runtime settings
# (device, batch size, threads) are not tracked. Manifests are tracked inputs; the big files beside
# them are ancient().

import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir, "scripts")))

from snakemake.exceptions import WorkflowError

from eora import config as cfg
from eora import manifest as mf
from eora import plan, shapes, stages, store

try:
    for _file in workflow.configfiles:
        cfg.check_file(Path(_file))
    config = cfg.validate(
        config,
        cfg.load_schema(Path(workflow.basedir, "workflow/schemas/config.schema.yaml")),
    )
    for _model, _entry in config["models"].items():
        _known = cfg.known_weights(_entry, Path(config["results"], "models", _model, mf.NAME))
        if _known is not None:
            cfg.check_ranks(_known, _model, cfg.asked_ranks(config, _model))
except cfg.Mistake as error:
    # The message is for the person who edits the file: no traceback, no line of this one.
    _files = ", ".join(map(str, workflow.configfiles)) or "The config"
    sys.exit(f"{_files} does not fit. Please mend:\n{error}")

RESULTS = config["results"]
RUNTIME = config["runtime"]
SHARDS = config["covariance"]["shards"]
THREADS = RUNTIME["threads"] or min(8, os.cpu_count())
VARIANTS = {(v.model, v.name): v for v in cfg.variants(config)}
ASKED = stages.asked(config)


wildcard_constraints:
    model=r"[^/]+",
    dataset=r"[^/]+",
    calibration=r"[^/]+",
    compression=r"[^/+]+",
    adapter=r"[^/+]+",
    variant=r"[^/]+",
    task=r"[^/]+",
    rank=r"\d+",
    bits=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


def made(folder):
    """The manifest of a stage's output folder."""
    return f"{RESULTS}/{folder}/{mf.NAME}"


def spec(stage):
    """A stage's tracked param: what of the config changes its result, and its version."""
    return lambda wc: mf.canonical(stages.params(config, stage, dict(wc.items())))


def kept():
    """The script's argument for the store of results. Untracked, and none where it is off."""
    options = ["--store", f"{RESULTS}/{store.NAME}"] if RUNTIME["store"] else []
    return lambda wc, input: options


def path_option(entry):
    """The script's argument for a local source."""
    return ["--path", str(Path(entry["path"]).expanduser())] if "path" in entry else []


def trust_option(entry):
    """The script's argument for a model whose own code may run."""
    return ["--trust-remote-code"] if entry["trust_remote_code"] else []


def script(name):
    """A stage's command. Untracked, as params that depend on input are: the checkout may move."""
    path = Path(workflow.basedir, "scripts", f"{name}.py")
    return lambda wc, input: path


# --- How much a job asks for: what `make plan` tells, and more at each attempt. ---

COSTS = {on_gpu: plan.Costs(config, on_gpu) for on_gpu in (True, False)}
KNOWN_SHAPES = {}
# Of what is predicted: for what a prediction misses, and a machine that is slower than assumed.
ROOM = {"mem_mb": 1.25, "gpu_mem_mb": 1.15, "runtime": 2}
# While the model is not downloaded. Snakemake asks again when a job is ready, and then it is.
UNKNOWN = {"mem_mb": 16_000, "gpu_mem_mb": 16_000, "runtime": 240}


def on_gpu():
    """Whether GPU jobs will have one. With `auto` a cluster's do, as they ask for it."""
    if RUNTIME["device"] != "auto":
        return RUNTIME["device"] != "cpu"
    return not workflow.local_exec or shutil.which("nvidia-smi") is not None


def shapes_of(model):
    """The model's shapes, None as long as they are not known."""
    if KNOWN_SHAPES.get(model) is None:
        made = Path(RESULTS, "models", model)
        try:
            KNOWN_SHAPES[model] = shapes.known(config["models"][model], made)
        except cfg.Mistake:  # told by the jobs that read the model
            return None
    return KNOWN_SHAPES[model]


@cache
def predicted(place, gpu):
    """What a job is taken to need: mem_mb, gpu_mem_mb and runtime (minutes)."""
    cost = COSTS[gpu].of(place, KNOWN_SHAPES[dict(place.wildcards)["model"]])
    if place.stage in plan.ONE_THREAD:
        cards = [plan.cpu(1)]
    else:
        cards = plan.CARDS.values() if gpu else [plan.cpu(THREADS)]
    return {
        "mem_mb": plan.total(plan.peak(cost.host)) / 1e6,
        "gpu_mem_mb": plan.total(plan.peak(cost.device)) / 1e6,
        "runtime": 60 * max(card.hours(cost) for card in cards),
    }


def sized(stage, resource, least=0):
    """A resource of a stage's jobs; half as much again with each further attempt."""

    def amount(wc, attempt):
        if shapes_of(wc.model) is None:
            first = UNKNOWN[resource]
        else:
            needed = predicted(stages.place(stage, **wc), on_gpu())[resource]
            first = math.ceil(needed * ROOM[resource])
        return math.ceil(max(first, least) * (1 + attempt) / 2)

    return amount


def planned_mb(stage):
    """Memory that a job is taken to need where it computes, in MB; 0 while that is not known."""

    def amount(wc):
        if shapes_of(wc.model) is None:
            return 0
        gpu = on_gpu()
        needed = predicted(stages.place(stage, **wc), gpu)
        return round(needed["gpu_mem_mb" if gpu else "mem_mb"])

    return amount


def refuse_doubles():
    """Stop where SLURM still has jobs of an earlier run that was killed, not to run them twice."""
    if workflow.local_exec or shutil.which("squeue") is None:
        return
    asked = ["squeue", "--me", "--noheader", "--format=%i|%T|%k|%Z"]
    told = subprocess.run(asked, capture_output=True, text=True).stdout
    jobs = [line.split("|", 3) for line in told.splitlines()]
    alive = [job for job in jobs if Path(job[-1]) == Path(workflow.workdir_init)]
    if alive:
        listed = "\n".join(f"  {number} {state} {rule}" for number, state, rule, _ in alive)
        raise WorkflowError(
            f"SLURM still has jobs of an earlier run in this folder:\n{listed}\n"
            "Wait until they have ended, and run again: what they make is kept. Or cancel them:"
            f" scancel {' '.join(job[0] for job in alive)}"
        )


def tracked_and_files(folders):
    """Inputs by key -> (folder, what in it): their manifests (tracked) and big files (ancient)."""
    tracked = {key: made(folder) for key, (folder, _) in folders.items()}
    files = {
        f"{key}_files": ancient(f"{RESULTS}/{folder}/{name}")
        for key, (folder, name) in folders.items()
    }
    return tracked | files


def options(input, *keys):
    """A script's arguments for those of these inputs that a job has; of several of a kind, numbered
    (moments_0), for each."""
    found = [
        (key, name) for key in keys for name in input.keys() if re.fullmatch(rf"{key}(_\d+)?", name)
    ]
    return [part for key, name in found for part in (f"--{key}", input[name])]


# --- tokenize.smk ---


def plain_option(model):
    """The script's arguments for what wants plain linear layers of a model."""
    return [part for key in cfg.plain_alone(config, model) for part in ("--plain", key)]


def datasets_of(wc):
    """Folders of the data sets that a calibration is cut from."""
    return [f"datasets/{name}" for name in cfg.shares(config["calibrations"][wc.calibration])]


# --- compress.smk ---


def compress_inputs(wc):
    """What a model is compressed by: calibration samples, and the adapter that it is rounded
    around if there is one; or the existing checkpoint; or a compression and second moments to fit
    its scales in."""
    entry = config["compressions"][wc.compression]
    folders = {}
    if "checkpoint" in entry:
        folders["checkpoint"] = (f"checkpoints/{wc.model}/{wc.compression}", "model")
    elif entry["method"] == "rescale":
        folders["compressed"] = (f"compressed/{wc.model}/{entry['compression']}", "model")
        for part in stages.parts(config):
            moments = stages.place(
                "covariance", model=wc.model, calibration=entry["calibration"], **part
            )
            folders[f"moments_{part['shard']}"] = (moments.folder, "moments")
    else:
        tokens = f"tokens/{wc.model}/{entry['calibration']}"
        folders["tokens"] = (tokens, "tokens.safetensors")
    if "around" in entry:
        inner = stages.rounded_around(config, wc.model, wc.compression)
        folders["adapter"] = (inner.adapter_folder, "adapter")
    return tracked_and_files(folders)


# --- covariance.smk ---


def shard_before(stage):
    """Inputs of shard k > 0, a name for each: manifest and hidden states of the one before."""

    def folder(wc):
        return stages.place(stage, **{**wc, "shard": int(wc.shard) - 1}).folder

    return {
        "before": lambda wc: [made(folder(wc))] if int(wc.shard) else [],
        "hidden": lambda wc: (
            ancient(f"{RESULTS}/{folder(wc)}/hidden.safetensors") if int(wc.shard) else []
        ),
    }


# --- adapter.smk ---


def moments_of(wc):
    """Folder of the second moments that an adapter's shard is fitted in."""
    return stages.fitted_in(config, **wc).folder


def shards_of(wc):
    """Folders of all decompositions that a rank is sliced from."""
    base = f"decompositions/{wc.model}/{wc.compression}/{wc.adapter}"
    return [f"{base}/{shard}-of-{SHARDS}" for shard in range(SHARDS)]


def tuned_on(wc):
    """Folder of the samples that an adapter is fine-tuned on."""
    return f"tokens/{wc.model}/{config['adapters'][wc.adapter]['tune']['calibration']}"


# --- evaluate.smk ---


def evaluation_inputs(wc):
    """Manifests (tracked) and big files (ancient) of what is judged and what it is judged by."""
    variant, task = VARIANTS[wc.model, wc.variant], config["tasks"][wc.task]
    folders = {"model": (variant.model_folder, "model")}
    if variant.adapter_folder is not None:
        folders["adapter"] = (variant.adapter_folder, "adapter")
    if "lm_eval" in task:
        folders["task"] = (f"tasks/{wc.task}", "task.json")
    for key, name in (
        ("dataset", task.get("dataset") or task.get("perplexity")),
        ("fewshot", task.get("fewshot_dataset")),
    ):
        if name is not None:
            folders[key] = (f"datasets/{name}", "data")
    return tracked_and_files(folders)


# --- report.smk ---


def judged():
    """Folders of all evaluations that the config asks for."""
    return [place.folder for place in ASKED if place.stage == "evaluate"]


def wanted():
    """Files that are made again when they are lost: manifests, and what the user is after.

    Of evaluations, which are many, the results alone: nothing is made from their manifests.
    """
    products = [f"{RESULTS}/{place.folder}/{place.product}" for place in ASKED if place.product]
    return products + [made(place.folder) for place in ASKED if place.stage != "evaluate"]


def weighed():
    """Folders of the models and adapters whose bytes the report counts."""
    return [v.adapter_folder or v.model_folder for v in VARIANTS.values()]
