"""The report's page in a real browser: what its script does, and that it fits its window."""

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from test_report import USUAL, make, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed")

TABLE = "document.querySelector('table[data-sortable]')"
# The variants whose rows are seen.
SEEN = f"""[...{TABLE}.tBodies[0].rows]
    .filter(row => row.checkVisibility()).map(row => row.cells[0].innerText)"""


def told(folder: Path, html: str) -> Any:
    """What a page leaves in its title, as JSON; no error may be in the browser's log."""
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1700,1000"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(unescape(done.stdout.split("<title>")[1].split("</title>")[0]))


def ask(folder: Path, script: str) -> Any:
    """What a function's body returns that runs at the report's end."""
    asked = f"<script>document.title = JSON.stringify((() => {{ {script} }})())</script></body>"
    return told(folder, page(folder, make(folder, USUAL)).replace("</body>", asked))


def test_rows_are_filtered_by_words(tmp_path):
    script = f"""
        const input = document.querySelector(".filter input"), found = {{}};
        for (const words of ["W2", "w2 r8", "nothing", ""]) {{
            input.value = words;
            input.dispatchEvent(new Event("input"));
            found[words] = [{SEEN}, document.querySelector(".filter output").innerText];
        }}
        return found;"""
    assert ask(tmp_path, script) == {
        "W2": [["w2g32", "w2g32+r8"], "2 of 4"],
        "w2 r8": [["w2g32+r8"], "1 of 4"],
        "nothing": [[], "0 of 4"],
        "": [["original", "w2g32", "w2g32+r8", "w4g32"], "4 of 4"],
    }


def test_rows_are_sorted_by_a_column_and_those_without_a_number_are_last(tmp_path):
    """By perplexity, by bits (the original has none), and by name, each upwards and downwards."""
    script = f"""
        const found = [];
        for (const column of [7, 1, 0]) {{
            const head = {TABLE}.querySelector(`th[data-column="${{column}}"]`);
            for (const way of ["ascending", "descending"]) {{
                head.querySelector("button").click();
                const sorted = [...{TABLE}.querySelectorAll("[aria-sort]")];
                if (sorted.length != 1 || sorted[0].ariaSort != way) throw Error(way);
                found.push({SEEN});
            }}
        }}
        return found;"""
    names = ["original", "w2g32", "w2g32+r8", "w4g32"]
    found = ask(tmp_path, script)
    assert found[0] == ["original", "w2g32+r8", "w4g32", "w2g32"]
    assert found[1] == found[0][::-1]
    assert found[2] == ["w2g32", "w2g32+r8", "w4g32", "original"]
    assert found[3] == ["w4g32", "w2g32", "w2g32+r8", "original"]
    assert found[4] == names and found[5] == names[::-1]


MANY = {"original": (0.6, 10.0), "w2g32": (0.4, 40.0), "w4g32": (0.58, 12.0)}
MANY |= {f"w2g32+r{rank}": (0.4 + rank / 1000, 40.0 - rank) for rank in (1, 2, 4, 8, 16, 32)}


def framed(folder: Path, html: str, width: int, script: str) -> Any:
    """What a function's body returns of a page ("inside") in a frame of a width, as Chromium's
    windows are never as narrow as a phone or a sheet."""
    frame = f"""<title></title>
        <iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(html)}"></iframe>
        <script>onload = () => {{
            const inside = frames[0].document;
            document.title = JSON.stringify((() => {{ {script} }})());
        }}</script>"""
    return told(folder, frame)


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_is_wider_than_the_window(tmp_path, width):
    html = page(tmp_path, make(tmp_path, MANY))
    script = "return [inside.documentElement.scrollWidth, frames[0].innerWidth]"
    needed, given = framed(tmp_path, html, width, script)
    assert needed <= given == width


def test_a_printed_sheet_holds_all_of_every_table_and_what_was_folded(tmp_path):
    """A sheet of A4 between its margins is 688 pixels wide, one that lies on its side 1,016."""
    html = page(tmp_path, make(tmp_path, MANY))
    assert html.count("@media print") == 1
    script = """
        const fold = () => inside.querySelectorAll("details:not([open])").length;
        const before = fold();
        frames[0].dispatchEvent(new Event("beforeprint"));
        const meanwhile = fold();
        const widths = [...inside.querySelectorAll("table")].map(
            table => [table.closest(".sheet") !== null, table.getBoundingClientRect().right]);
        frames[0].dispatchEvent(new Event("afterprint"));
        return [before, meanwhile, fold(), widths];"""
    printed = html.replace("@media print", "@media all")
    before, meanwhile, after, widths = framed(tmp_path, printed, 688, script)
    assert before == after > meanwhile == 0
    assert len(widths) > 5 and any(lying for lying, _ in widths)
    assert all(right <= (1016 if lying else 688) for lying, right in widths), widths


def test_numbers_are_those_of_the_table(tmp_path):
    script = f"""return [...{TABLE}.tBodies[0].rows].map(
        r => [r.cells[0].innerText, ...[3, 5, 7].map(i => Number(r.cells[i].dataset.number))])"""
    found = ask(tmp_path, script)
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    for variant, size, accuracy, perplexity in found:
        same = {row["task"]: row for row in rows if row["variant"] == variant}
        assert size == same["arc-easy"]["bytes"]
        assert accuracy == same["arc-easy"]["value"]
        assert perplexity == same["heldout-perplexity"]["value"]
    assert len(found) == len(USUAL)
