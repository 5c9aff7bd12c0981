"""Early cut-off, really run: what comes out the same is restored, and nothing after it computed."""

import json
import os
import re
import shutil
import signal
import sys
import time

from conftest import ROOT, contents, failures, unsummed
from eora import manifest, store


def run(clone, *args):
    """Run the workflow; return the folders of the stages that were restored and computed."""
    before = {path: path.stat().st_mtime_ns for path in logs(clone)}
    done = clone.snakemake(*args)
    assert done.returncode == 0, failures(done.stdout, clone.folder)
    ran = {path for path in logs(clone) if before.get(path) != path.stat().st_mtime_ns}
    restored = {path for path in ran if "Restored from" in path.read_text()}
    names = (
        {path.relative_to(clone.results / "logs").with_suffix("").as_posix() for path in some}
        for some in (restored, ran - restored)
    )
    return tuple(names)


def logs(clone):
    return list((clone.results / "logs").rglob("*.log"))


def is_quick(stage):
    """Stages that are not worth keeping: they look at local files or write the report."""
    return re.match(
        "report|check_model|prepare_task|download_(model/tiny|dataset/questions)", stage
    )


def test_an_identical_remake_stops_there(small):
    """The same fetched again: what follows runs, as Snakemake wants, and computes nothing."""
    run(small)  # the smaller report
    before = contents(small)
    restored, computed = run(small, "--forcerun", "download_model", "download_dataset")
    assert all(is_quick(stage) for stage in computed), computed
    stages = {stage.split("/")[0] for stage in restored}
    assert {"compress", "covariance", "decompose", "adapter", "evaluate"} <= stages
    assert contents(small) == before
    assert "Nothing to be done" in small.snakemake("--dry-run").stdout


def test_iters_there_and_back(small):
    before = contents(small)
    small.config["compressions"]["w2"]["iters"] = 2
    _, computed = run(small)
    assert {
        "compress/tiny/w2",
        "decompose/tiny/w2/eora/1-of-2",
        "evaluate/tiny/w2/text",
    } <= computed
    changed = contents(small)
    assert changed["compressed/tiny/w2/manifest.json"] != before["compressed/tiny/w2/manifest.json"]
    small.config["compressions"]["w2"]["iters"] = 1
    restored, computed = run(small)
    assert all(is_quick(stage) for stage in computed), computed
    assert {"compress/tiny/w2", "decompose/tiny/w2/eora/1-of-2"} <= restored
    assert unsummed(contents(small)) == unsummed(before)


def test_a_renamed_model_is_restored(clone):
    models = clone.config["models"]
    clone.config["models"] = {"tiny": models["tiny"], "renamed": models["twin"]}
    restored, computed = run(clone)
    assert {"download_model/renamed", "compress/renamed/w2"} <= restored
    assert all(is_quick(stage) for stage in computed), computed
    one, other = (clone.results / f"adapters/{n}/w2/eora/r8-16bit" for n in ("twin", "renamed"))
    assert manifest.digest(one) == manifest.digest(other)


def test_another_max_rank_evaluates_nothing_anew(small):
    """Other columns are decomposed, but the slices of the same ranks come out the same: as long as
    the solver takes to float64 for neither, which inputs of fewer directions than that make it."""
    small.config["adapters"]["eora"]["max_rank"] = 12
    _, computed = run(small)
    assert any(stage.startswith("decompose") for stage in computed)
    again = re.compile("compress|covariance|quantize|evaluate")
    assert not any(map(again.match, computed)), computed


def test_a_deleted_result_is_back_in_a_second(clone):
    before = contents(clone)
    shutil.rmtree(clone.results / "covariance/tiny/moments/1-of-2")
    restored, computed = run(clone)
    assert {"covariance/tiny/moments/1-of-2", "evaluate/tiny/w2+eora-r8-4bit/text"} <= restored
    assert computed == {"report"}
    assert contents(clone) == before


def test_a_shard_whose_predecessor_was_restored_is_computed_all_the_same(clone):
    """Hidden states are not kept: the shard starts from the samples and gives the same moments."""
    before = contents(clone)
    shutil.rmtree(clone.results / "covariance/tiny/moments/1-of-2")
    for entry in (clone.results / store.NAME / "covariance").iterdir():
        if manifest.load(entry)["params"]["shard"] == 1:
            shutil.rmtree(entry)
    restored, computed = run(clone)
    assert "covariance/tiny/moments/0-of-2" in restored
    assert "covariance/tiny/moments/1-of-2" in computed
    assert contents(clone) == before


def test_a_killed_shard_restarts_at_that_shard(small):
    """Killed as its first, and then as its last block is written; the shard before it is not run
    again."""
    before = contents(small)
    small.config["runtime"]["store"] = False
    shutil.rmtree(small.results / "covariance/tiny/moments")
    shard = small.results / "covariance/tiny/moments/1-of-2"
    target = f"results/covariance/tiny/moments/1-of-2/{manifest.NAME}"
    for done in ("block-0001.safetensors", "block-0002.safetensors"):
        kill_shard(small, target, shard, done)
        assert not (shard / manifest.NAME).exists()
        assert (shard.parent / "0-of-2/hidden.safetensors").exists()

    _, computed = run(small, "--", target)
    assert "covariance/tiny/moments/1-of-2" in computed
    assert not any(re.match("covariance.*0-of-2|tokenize|compress", stage) for stage in computed)
    (shard / "hidden.safetensors").unlink()  # for the shard that would follow the last
    assert unsummed(contents(small)) == unsummed(before)


def kill_shard(flow, target, shard, done):
    """Run until the job that computes a shard has just written a block's file, and kill that."""
    old = set(shard.glob(".partial-*"))
    process = flow.start(*flow.command(flow.write(), "--", target))
    while not (new := set(shard.glob(".partial-*")) - old):
        assert process.poll() is None, process.communicate()[0]
    (partial,) = new
    job = int(partial.name.rpartition("-")[2])
    while not (partial / "result/moments" / done).exists():  # a millisecond at a time
        os.kill(job, signal.SIGCONT)
        time.sleep(0.001)
        os.kill(job, signal.SIGSTOP)
    os.kill(job, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0


def status(clone, script, *args):
    process = clone.start(
        sys.executable, ROOT / f"scripts/{script}.py", "--config", clone.write(clone.config), *args
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def test_orphans_and_what_no_result_uses_are_listed_and_deleted_on_yes(clone):
    keep = contents(clone)
    del clone.config["models"]["twin"], clone.config["tasks"]["text"]
    mine = clone.results / "models/notes.txt"
    mine.write_text("not of a stage")

    told = status(clone, "clean_orphans")
    assert "models/twin" in told and "evaluations/tiny/original/text" in told
    assert "Nothing was deleted" in told and (clone.results / "models/twin").exists()
    assert "No longer named in the config" in status(clone, "status")

    status(clone, "clean_orphans", "--yes")
    left = contents(clone)
    assert not any("/twin/" in name or name.endswith("/text/manifest.json") for name in left)
    assert set(left) - {"models/notes.txt"} == {
        name for name in keep if "/twin/" not in name and "/text/" not in name
    }
    assert "0 results" in status(clone, "clean_orphans")
    assert not list(clone.results.glob("logs/compress/twin/*"))

    told = status(clone, "prune")
    entries = len(list(store.entries(clone.results / store.NAME)))
    status(clone, "prune", "--yes")
    assert len(list(store.entries(clone.results / store.NAME))) < entries
    assert "0 kept results" in status(clone, "prune")
    assert contents(clone) == left


def test_nothing_is_deleted_beside_a_run(clone):
    del clone.config["models"]["twin"]
    locks = clone.folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.input.lock").write_text("")
    process = clone.start(
        sys.executable,
        ROOT / "scripts/clean_orphans.py",
        *("--config", clone.write(clone.config), "--yes"),
    )
    output, _ = process.communicate()
    assert process.returncode != 0 and "unlock" in output
    assert (clone.results / "models/twin/manifest.json").exists()


def test_lost_notes_of_snakemake_are_told(clone):
    """Without .snakemake a changed parameter is not seen by a run; status sees it."""
    shutil.rmtree(clone.folder / ".snakemake")
    clone.config["compressions"]["w2"]["seed"] = 7
    told = status(clone, "status")
    assert "differs compressions.w2.seed: 42 -> 7" in told
    lines = [json.loads(line) for line in status(clone, "status", "--json").splitlines()]
    assert {line["folder"] for line in lines if line["state"] == "differs"} == {
        "compressed/tiny/w2",
        "compressed/twin/w2",
    }
