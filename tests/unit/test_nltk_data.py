"""NLTK's data beside a task: taken from the machine, asked for again, and missed."""

import nltk
import pytest

from eora import nltk_data
from eora.errors import Mistake


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose NLTK has two packages, one as a zip file."""
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    (tmp_path / "nltk/tokenizers/punkt_tab/words.tab").write_text("a")
    (tmp_path / "nltk/tokenizers/punkt.zip").write_bytes(b"zip")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "missing"), str(tmp_path / "nltk")])
    return tmp_path


def ask(name):
    """As lm-eval's tasks do."""
    try:
        nltk.data.find(f"tokenizers/{name}")
    except LookupError:
        nltk.download(name)


@pytest.mark.parametrize(
    ("name", "file"), [("punkt_tab", "punkt_tab/words.tab"), ("punkt", "punkt.zip")]
)
def test_what_the_machine_has_is_copied(machine, name, file):
    before = nltk.download, list(nltk.data.path)
    for _ in range(2):  # the second time it is there
        with nltk_data.kept(machine / "task", network=True) as asked:
            ask(name)
        assert asked == [name]
    assert (machine / "task/tokenizers" / file).is_file()
    assert (nltk.download, nltk.data.path) == before
    with nltk_data.kept(machine / "task", network=False) as asked:
        ask(name)


def test_what_is_not_kept_is_missed_without_a_network(machine):
    with (
        pytest.raises(Mistake, match="punkt_tab, which this task needs, .*--forcerun prepare_task"),
        nltk_data.kept(machine / "task", network=False),
    ):
        ask("punkt_tab")
    assert nltk.data.path
