"""The store: an equal result is restored, and nothing that is not whole is trusted."""

import os
import shutil

import pytest

from eora import manifest, store
from eora.result import Result

ALL = {"version": 1, "bits": 2}


@pytest.fixture
def run(tmp_path):
    """Runs a stage on one store; says whether it was restored."""

    def run(name, params=ALL, content="x", **options):
        result = Result(tmp_path / name, "s", params, kept=tmp_path / "store", **options)
        if result.restored():
            return True
        with result.publish() as folder:
            (folder / "data").mkdir()
            (folder / "data" / "file.bin").write_text(content)
            (folder / "seconds.json").write_text(str(os.urandom(4)))
            (folder / "passing.bin").write_text("huge")
        return False

    return run


def only_entry(tmp_path):
    (entry,) = (tmp_path / "store" / "s").iterdir()
    return entry


def test_an_equal_result_is_restored_whole(run, tmp_path):
    options = {"volatile": ("seconds.json",), "passing": ("passing.bin",)}
    assert not run("a", **options)
    assert run("b", content="never written", **options)
    for name in ("manifest.json", "data/file.bin", "seconds.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/data/file.bin").samefile(tmp_path / "b/data/file.bin")
    assert not (tmp_path / "b/passing.bin").exists()
    # A touched manifest must not pass for that of the entry.
    assert not (tmp_path / "a/manifest.json").samefile(only_entry(tmp_path) / "manifest.json")


@pytest.mark.parametrize(
    "change",
    [
        {"params": ALL | {"bits": 3}},
        {"params": ALL | {"version": 2}},
        {"inputs": {"model": "other"}},
        {"tools": ("pytest",)},
    ],
    ids=["parameter", "version", "input", "tool"],
)
def test_another_recipe_is_another_result(run, tmp_path, change):
    run("a")
    if "inputs" in change:
        run("other", params={"version": 1})
        change = {"inputs": {"model": tmp_path / "other"}}
    assert not run("b", **change)
    assert run("a")


def test_going_back_is_free(run):
    first, second = ALL, ALL | {"bits": 3}
    assert not run("a", first) and not run("a", second)
    assert run("a", first) and run("a", second)


def test_nothing_is_kept_of_a_job_that_dies(run, tmp_path):
    result = Result(tmp_path / "a", "s", ALL, kept=tmp_path / "store")
    with pytest.raises(RuntimeError), result.publish() as folder:
        (folder / "half").write_text("ha")
        raise RuntimeError("killed")
    assert not (tmp_path / "store").exists()
    assert not run("a")


def test_what_a_killed_job_left_in_the_store_is_not_found(run, tmp_path):
    run("a")
    entry = only_entry(tmp_path)
    entry.rename(entry.with_name(f".partial-1-{entry.name}"))
    assert not run("b")


def damage_in_place(path):
    path.write_text("y")  # same length


def remove(path):
    path.unlink()


def shorten(path):
    stamp = path.stat()
    path.write_text("")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("damage", [damage_in_place, remove, shorten])
def test_a_damaged_entry_is_made_anew(run, tmp_path, damage):
    run("a")
    damage(only_entry(tmp_path) / "data/file.bin")
    assert not run("b")
    assert (tmp_path / "b/data/file.bin").read_text() == "x"
    assert run("c")


def test_a_touched_entry_is_read_and_trusted(run, tmp_path):
    run("a")
    (tmp_path / "a/data/file.bin").touch()
    assert run("b")


def test_of_two_jobs_that_meet_both_end_whole(tmp_path):
    """Both found nothing to restore, both compute: the later one's entry takes the place."""
    kept = tmp_path / "store"
    first, second = (Result(tmp_path / name, "s", ALL, kept=kept) for name in "ab")
    assert not first.restored() and not second.restored()
    with first.publish() as one, second.publish() as two:
        (one / "x").write_text("1")
        (two / "x").write_text("1")
    assert manifest.digest(tmp_path / "a") == manifest.digest(tmp_path / "b")
    assert (tmp_path / "a/x").exists() and (tmp_path / "b/x").exists()
    assert [kept.stage for kept in store.entries(kept)] == ["s"]
    assert Result(tmp_path / "c", "s", ALL, kept=kept).restored()


def test_an_entry_that_goes_while_it_is_restored_is_computed(run, tmp_path, monkeypatch):
    run("a")
    entry = only_entry(tmp_path)
    link = os.link

    def pruned_meanwhile(source, target):
        shutil.rmtree(entry, ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", pruned_meanwhile)
    assert not run("b")
    monkeypatch.undo()
    assert (tmp_path / "b/data/file.bin").read_text() == "x"


def test_a_file_system_without_hard_links_still_works(run, tmp_path, monkeypatch, caplog):
    def refuse(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert not run("a") and not run("b")
    assert "Not kept" in caplog.text
    assert list(store.entries(tmp_path / "store")) == []


def test_another_content_of_the_same_recipe_is_told(run, tmp_path, caplog):
    run("a")
    result = Result(tmp_path / "a", "s", ALL, kept=tmp_path / "store")
    with result.publish() as folder:
        (folder / "data").write_text("another")
    assert "not bit-identical" in caplog.text
    assert run("b") and (tmp_path / "b/data").read_text() == "another"


def test_what_an_entry_takes_and_what_pruning_frees(run, tmp_path):
    run("a", content="x" * 5000)
    (kept,) = store.entries(tmp_path / "store")
    assert kept.bytes > 5000 and kept.freed == 0
    shutil.rmtree(tmp_path / "a")
    (kept,) = store.entries(tmp_path / "store")
    assert kept.freed == kept.bytes > 5000
