"""Edit one thing after a full run, dry-run, and compare the exact set of jobs."""

import copy
import os
import re
import shutil
import time

import pytest
import yaml

from conftest import Pipeline, make_model

JOB = re.compile(r"^Job \d+: (.*)$", re.MULTILINE)

EVALUATE = "Judging {} {} by {}"
REPORT = "Writing the report"
TASKS = ("choice", "text")


def planned(pipeline, config=None):
    """Messages of the jobs that a run would start; they name rule and wildcards."""
    done = pipeline.snakemake("--dry-run", config=config)
    assert done.returncode == 0, done.stdout[-3000:]
    jobs = JOB.findall(done.stdout)
    assert bool(jobs) != ("Nothing to be done" in done.stdout)
    return set(jobs)


def edited(pipeline, path, value):
    """A copy of the config with one key (dotted path) set; None removes it."""
    config = copy.deepcopy(pipeline.config)
    *above, last = path.split("/")
    place = config
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


def judged(*variants, model="tiny", tasks=TASKS):
    return {EVALUATE.format(model, v, t) for v in variants for t in tasks}


def decomposed(*compressions, model="tiny"):
    return {
        f"Decomposing the error of {model} {c} for eora, shard {s} of 2"
        for c in compressions
        for s in range(2)
    }


def adapted(*compressions, rank=8, model="tiny"):
    return {f"Adapter eora of rank {rank} for {model} {c}" for c in compressions}


def rounded(*compressions, rank=8, bits=4, model="tiny"):
    return {
        f"Rounding adapter eora of rank {rank} for {model} {c} to {bits} bits" for c in compressions
    }


def compensated(*compressions, ranks=(8,), bits=(16, 4)):
    return [f"{c}+eora-r{r}-{b}bit" for c in compressions for r in ranks for b in bits]


def covariances(model="tiny"):
    return {f"Second moments of {model} on moments, shard {s} of 2" for s in range(2)}


def after_decomposition(*compressions):
    """A compression's decomposition and all that follows from it."""
    return (
        decomposed(*compressions)
        | adapted(*compressions)
        | rounded(*compressions)
        | judged(*compensated(*compressions))
        | {REPORT}
    )


BOTH = ("w2", "w4")


def test_nothing(pipeline):
    assert planned(pipeline) == set()


def test_comments_key_order_and_explicit_defaults(pipeline):
    file = pipeline.folder / "reordered.yaml"
    config = copy.deepcopy(pipeline.config)
    config["compressions"]["w2"] |= {"sym": False, "seed": 42, "alg_ext": False, "keep": []}
    reordered = {k: config[k] for k in reversed(config)}
    file.write_text("# a comment\n" + yaml.safe_dump(reordered, sort_keys=False))
    assert planned(pipeline, yaml.safe_load(file.read_text())) == set()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runtime/device", "auto"),
        ("runtime/batch_size", 3),
        ("runtime/threads", 2),
        ("tasks/choice/batch_size", 2),
    ],
)
def test_runtime_settings(pipeline, path, value):
    assert planned(pipeline, edited(pipeline, path, value)) == set()


@pytest.mark.parametrize("how", ["copied", "touched"])
def test_touching_or_copying_results(pipeline, tmp_path, how):
    clone = Pipeline(tmp_path / "copy", pipeline.config)
    shutil.copytree(pipeline.folder, clone.folder)  # copies mtimes of files, not of folders
    if how == "touched":
        now = time.time()
        for i, path in enumerate(sorted(clone.results.rglob("*"), reverse=True)):
            os.utime(path, (now - i, now - i))
    assert planned(clone) == set()


def test_add_a_rank(pipeline):
    assert planned(pipeline, edited(pipeline, "adapters/eora/ranks", [8, 12])) == (
        adapted(*BOTH, rank=12)
        | rounded(*BOTH, rank=12)
        | judged(*compensated(*BOTH, ranks=(12,)))
        | {REPORT}
    )


def test_raise_max_rank(pipeline):
    config = edited(pipeline, "adapters/eora/max_rank", 24)
    assert planned(pipeline, config) == after_decomposition(*BOTH)


def test_add_a_task(pipeline):
    config = edited(pipeline, "tasks/more", {"perplexity": "sentences", "window": 16})
    everything = ("original", *BOTH, *compensated(*BOTH))
    assert planned(pipeline, config) == judged(*everything, tasks=("more",)) | {REPORT}


def test_change_a_tasks_limit(pipeline):
    everything = ("original", *BOTH, *compensated(*BOTH))
    config = edited(pipeline, "tasks/choice/limit", 7)
    assert planned(pipeline, config) == judged(*everything, tasks=("choice",)) | {REPORT}


def test_show_another_metric(pipeline):
    assert planned(pipeline, edited(pipeline, "tasks/choice/metric", "acc")) == {REPORT}


def test_add_adapter_bits(pipeline):
    config = edited(pipeline, "adapters/eora/bits", [16, 4, 3])
    assert planned(pipeline, config) == (
        rounded(*BOTH, bits=3) | judged(*compensated(*BOTH, bits=(3,))) | {REPORT}
    )


def test_change_the_low_bit_adapters_groups(pipeline):
    config = edited(pipeline, "adapters/eora/group_size", 16)
    assert planned(pipeline, config) == (
        rounded(*BOTH) | judged(*compensated(*BOTH, bits=(4,))) | {REPORT}
    )


def test_add_a_compression_runs_no_covariance(pipeline):
    new = pipeline.config["compressions"]["w2"] | {"bits": 3}
    config = edited(pipeline, "compressions/w3", new)
    assert planned(pipeline, config) == (
        {"Compressing tiny to w3"} | judged("w3") | after_decomposition("w3")
    )


@pytest.mark.parametrize(("key", "value"), [("iters", 2), ("bits", 3), ("group_size", 16)])
def test_change_one_compression(pipeline, key, value):
    config = edited(pipeline, f"compressions/w2/{key}", value)
    assert planned(pipeline, config) == (
        {"Compressing tiny to w2"} | judged("w2") | after_decomposition("w2")
    )


def test_swapped_values_are_seen(pipeline):
    """Snakemake compares params as a set without names; the same values under other keys differ."""
    compression = pipeline.config["compressions"]["w2"] | {"iters": 4, "batch_size": 1}
    first = edited(pipeline, "compressions/w2", compression)
    assert planned(pipeline, first) & {"Compressing tiny to w2"}
    swapped = edited(
        pipeline, "compressions/w2", compression | {"group_size": 16, "batch_size": 32}
    )
    assert planned(pipeline, swapped) & {"Compressing tiny to w2"}


def test_calibration_of_the_moments(pipeline):
    config = edited(pipeline, "calibrations/moments/samples", 10)
    assert planned(pipeline, config) == (
        {"Tokenizing moments for tiny"} | covariances() | after_decomposition(*BOTH)
    )


def test_calibration_of_the_rounding(pipeline):
    config = edited(pipeline, "calibrations/rounding/samples", 5)
    assert planned(pipeline, config) == (
        {"Tokenizing rounding for tiny"}
        | {f"Compressing tiny to {c}" for c in BOTH}
        | judged(*BOTH)
        | after_decomposition(*BOTH)
    )


def test_add_a_model(pipeline):
    make_model(pipeline.folder / "sources/other", seed=1)
    new = {"path": str(pipeline.folder / "sources/other")}
    jobs = planned(pipeline, edited(pipeline, "models/other", new))
    assert REPORT in jobs and "Fetching model other" in jobs
    assert all("other" in job for job in jobs - {REPORT})
    assert len(jobs - {REPORT}) == 1 + 1 + 2 + 2 + 2 + 4 + 2 + 2 + 7 * 2


@pytest.mark.parametrize("path", ["compressions/w4", "tasks/text"])
def test_remove_an_entry(pipeline, path):
    assert planned(pipeline, edited(pipeline, path, None)) == {REPORT}


def test_remove_bits(pipeline):
    assert planned(pipeline, edited(pipeline, "adapters/eora/bits", [16])) == {REPORT}


def test_a_local_models_change_is_seen(pipeline, tmp_path):
    clone = Pipeline(tmp_path / "copy", copy.deepcopy(pipeline.config))
    shutil.copytree(pipeline.folder, clone.folder)
    changed = pipeline.folder / "sources/tiny/generation_config.json"
    before = changed.read_text()
    try:
        changed.write_text(before.replace("}", ', "temperature": 0.5}'))
        assert "Fetching model tiny" in planned(clone)
    finally:
        changed.write_text(before)


def test_a_lost_result_is_remade_with_what_follows(pipeline, tmp_path):
    clone = Pipeline(tmp_path / "copy", pipeline.config)
    shutil.copytree(pipeline.folder, clone.folder)
    (clone.results / "evaluations/tiny/w2/text/results.json").unlink()
    assert planned(clone) == judged("w2", tasks=("text",)) | {REPORT}


def test_a_lost_folder_that_nothing_waits_for_is_not_missed(pipeline, tmp_path):
    """Room can be made by deleting decompositions; they come back when a rank needs them."""
    clone = Pipeline(tmp_path / "copy", pipeline.config)
    shutil.copytree(pipeline.folder, clone.folder)
    shutil.rmtree(clone.results / "decompositions")
    assert planned(clone) == set()
    more = edited(pipeline, "adapters/eora/ranks", [8, 12])
    assert decomposed(*BOTH) <= planned(clone, more)
