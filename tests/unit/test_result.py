"""Results: the same content gives the same manifest, and nothing half-made looks whole."""

import json

import pytest

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


def test_what_a_killed_job_left_is_cleared(tmp_path):
    (tmp_path / ".partial-1").mkdir()
    (tmp_path / ".partial-1" / "big").write_text("half")
    make(tmp_path)
    assert not (tmp_path / ".partial-1").exists()


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
