"""lm-eval's tasks: where they are found, and what tells their data apart."""

import subprocess
import sys

import pytest

from conftest import ROOT
from eora import tasks
from eora.errors import Mistake


def test_content_tells_data_apart():
    rows = [{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]
    assert tasks.content(rows) == tasks.content([dict(r) for r in rows])
    assert tasks.content(rows) != tasks.content(rows[:1])


def test_a_tag_is_refused():
    with pytest.raises(Mistake, match="tag"):
        tasks.locate("ai2_arc")


def test_a_group_is_looked_for_everywhere():
    assert tasks.locate("mmlu") == "."


def test_finding_a_task_loads_no_torch():
    """It takes twice as long as all else that is imported."""
    asked = "import sys; from eora import tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT / "scripts").returncode == 0
