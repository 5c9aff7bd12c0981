"""Results: the same content gives the same manifest, and nothing half-made looks whole."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT
from eora import manifest
from eora.result import Result


def make(folder, content="x", params=None):
    with Result(folder, "s", params or {"version": 1}).publish() as out:
        (out / "data").mkdir()
        (out / "data" / "file.txt").write_text(content)
    return (folder / manifest.NAME).read_bytes()


def test_remaking_is_byte_identical_and_elsewhere_too(tmp_path):
    assert make(tmp_path / "a") == make(tmp_path / "a") == make(tmp_path / "b")


def test_content_and_params_show(tmp_path):
    assert len({make(tmp_path, "x"), make(tmp_path, "y"), make(tmp_path, "x", {"version": 2})}) == 3


def test_no_path_and_no_time_in_it(tmp_path):
    assert str(tmp_path) not in make(tmp_path / "a").decode()


def test_a_job_that_dies_leaves_no_manifest(tmp_path):
    make(tmp_path)
    with (
        pytest.raises(RuntimeError),
        Result(tmp_path, "s", {"version": 1}).publish() as out,
    ):
        (out / "half.txt").write_text("ha")
        raise RuntimeError("killed")
    assert not (tmp_path / manifest.NAME).exists()
    assert not (tmp_path / "half.txt").exists()
    assert not list(tmp_path.glob(".partial-*"))


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path):
    """Those that safetensors wrote for their owner alone; not those that are linked elsewhere."""
    theirs = tmp_path / "theirs"
    theirs.write_text("x")
    theirs.chmod(0o600)
    before = os.umask(0o027)
    try:
        with Result(tmp_path / "out", "s", {"version": 1}).publish() as out:
            save_file({"w": torch.zeros(1)}, out / "w.safetensors")
            (out / "w.safetensors").chmod(0o600)
            os.link(theirs, out / "linked")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert (modes["w.safetensors"], modes["linked"]) == (0o640, 0o600)


def test_what_a_killed_job_left_is_cleared(tmp_path):
    (tmp_path / ".partial-1").mkdir()
    (tmp_path / ".partial-1" / "big").write_text("half")
    make(tmp_path)
    assert not (tmp_path / ".partial-1").exists()


# Makes results with files "a" and "b" of one text, each when it reads a line or the end of input.
TWIN = """
import sys
from contextlib import suppress
from pathlib import Path
from eora.result import Result
out, rounds, text = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for _ in range(rounds):
    with Result(out, "s", {"version": 1}).publish() as partial:
        for name in "ab":
            (partial / name).mkdir()
            (partial / name / "file").write_text(text)
        print("begun", flush=True)
        sys.stdin.readline()
"""


def twin(out, rounds, text):
    return subprocess.Popen(
        [sys.executable, "-c", TWIN, out, str(rounds), text],
        env={"PYTHONPATH": str(ROOT / "scripts")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_copy_of_a_job_leaves_alone_what_the_other_is_filling(tmp_path):
    first = twin(tmp_path, 1, "first")
    assert first.stdout.readline() == "begun\n"
    (partial,) = tmp_path.glob(".partial-*")
    make(tmp_path)
    assert (partial / "result/a/file").read_text() == "first"
    first.kill()
    first.wait()
    make(tmp_path)
    assert not partial.exists()


def test_of_two_copies_the_one_that_ends_first_is_kept(tmp_path):
    late = twin(tmp_path, 1, "late")
    assert late.stdout.readline() == "begun\n"
    sealed = make(tmp_path, "early")
    late.communicate()
    assert late.returncode == 0
    assert (tmp_path / manifest.NAME).read_bytes() == sealed
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".partial-*"))


def test_copies_that_end_together_leave_one_whole_result(tmp_path):
    twins = [twin(tmp_path, 150, text) for text in ("one", "other")]
    for process in twins:
        process.stdin.close()
    assert [process.wait() for process in twins] == [0, 0]
    outputs = manifest.load(tmp_path)["outputs"]
    texts = {(tmp_path / name / "file").read_text() for name in "ab"}
    assert len(texts) == 1
    for name, told in outputs.items():
        assert manifest.sha256(tmp_path / name) == told["sha256"]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    """Who lives cannot be told there: what others were filling stays."""
    (tmp_path / ".partial-1").mkdir()

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    make(tmp_path)
    assert (tmp_path / "data/file.txt").read_text() == "x"
    assert (tmp_path / ".partial-1").exists()


def test_an_older_folder_is_replaced_whole(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stale.txt").write_text("old")
    make(tmp_path)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["file.txt"]


def test_volatile_files_are_published_but_not_digested(tmp_path):
    def measured(value):
        with Result(tmp_path, "s", {"version": 1}, volatile=("m.json",)).publish() as out:
            (out / "m.json").write_text(value)
        return (tmp_path / manifest.NAME).read_bytes()

    assert measured("1") == measured("2")
    assert (tmp_path / "m.json").read_text() == "2"


def test_inputs_are_recorded_by_what_they_hold(tmp_path):
    make(tmp_path / "in", "x")
    with Result(tmp_path / "out", "t", {"version": 1}, {"data": tmp_path / "in"}).publish():
        pass
    first = json.loads((tmp_path / "out" / manifest.NAME).read_text())["inputs"]["data"]
    assert first == manifest.digest(tmp_path / "in")
    make(tmp_path / "in", "y")
    assert first != manifest.digest(tmp_path / "in")


def test_an_input_may_be_one_folder_of_a_result(tmp_path):
    make(tmp_path / "in")
    before = manifest.digest(tmp_path / "in" / "data")
    with Result(tmp_path / "in", "s", {"version": 1}).publish() as out:
        (out / "data").mkdir()
        (out / "data" / "file.txt").write_text("x")
        (out / "beside.txt").write_text("new")
    assert manifest.digest(tmp_path / "in" / "data") == before
    make(tmp_path / "in", "y")
    assert manifest.digest(tmp_path / "in" / "data") != before


def test_digest_of_one_file_beside_the_manifest(tmp_path):
    def digest(content):
        with Result(tmp_path, "s", {"version": 1}).publish() as out:
            (out / "known.bin").write_text(content)
            (out / "known.bin.more").write_text("z")
        return manifest.digest(tmp_path / "known.bin")

    assert digest("x") == digest("x") != digest("y")


def left(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".progress")]


def test_what_a_killed_job_was_at_is_there_for_the_next_of_the_same_recipe(tmp_path):
    first, other = (Result(tmp_path, "s", {"version": version}) for version in (1, 2))

    def half(result):
        with suppress(RuntimeError), result.publish(), result.progress() as folder:
            (folder / "checkpoint").touch()
            raise RuntimeError

    half(first)
    with first.publish(), first.progress() as folder:
        assert (folder / "checkpoint").exists()
    assert left(tmp_path) == []
    half(first)
    with other.publish(), other.progress() as folder:
        assert not (folder / "checkpoint").exists()
        assert left(tmp_path) == [folder.name]


def test_two_copies_of_a_job_do_not_share_what_they_are_at(tmp_path):
    result = Result(tmp_path, "s", {"version": 1})
    with result.progress() as one:
        (one / "checkpoint").touch()
        with result.progress() as two:
            assert not (two / "checkpoint").exists()
        with result.progress() as three, result.progress() as four:
            assert len({one, three, four}) == 3
        assert (one / "checkpoint").exists()
    assert left(tmp_path) == []
