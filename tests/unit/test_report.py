"""Tests of the report: sizes, comparisons, CSV and page, from made-up manifests and results."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from eora import report
from eora.report import comparing, figures, reading, residuals, verdict
from eora.report import page as pages
from eora.report import words as show

LAYERS = 2
PLAN = {
    "tasks": ["arc-easy", "heldout-perplexity"],
    "compressions": {
        "w2g32": {"bits": 2, "group_size": 32, "sym": False, "calibration": "boolq"},
        "w4g32": {"bits": 4, "group_size": 32, "sym": False, "calibration": "boolq"},
    },
    "adapters": {"eora": {"calibration": "boolq", "method": "eora", "ranks": [8], "max_rank": 64}},
    "calibrations": {"boolq": {"dataset": "boolq", "samples": 64, "seqlen": 512}},
}
# Bytes, by hand. Two layers with a 64 x 32 projection each.
EMBED = 100 * 32 * 2
ORIGINAL = EMBED + LAYERS * (64 * 32 * 2 + 64 * 2 + 32 * 2)
W2 = EMBED + LAYERS * (2 * 64 * 4 + 1 * 64 * 2 + 1 * 4 * 4 + 64 * 2 + 32 * 2)
W4 = EMBED + LAYERS * (4 * 64 * 4 + 1 * 64 * 2 + 1 * 8 * 4 + 64 * 2 + 32 * 2)
RANK8 = LAYERS * (8 * 32 * 2 + 64 * 8 * 2)


def tensor(dtype: str, *shape: int) -> dict:
    return {"dtype": dtype, "shape": list(shape)}


def save(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def manifest(path: Path, tensors: dict, **tools: str) -> None:
    """Beside the folder that is loaded lies what other stages want of it."""
    beside = {f"layers.{i}.cross": tensor("BF16", 8, 32) for i in range(LAYERS)}
    files = {"model/model.safetensors": tensors, "moments.safetensors": beside}
    save(path, {"tensors": files, "tools": tools})


def original_tensors() -> dict:
    """Embeddings, and in each layer a projection with bias and a norm."""
    found = {"model.embed_tokens.weight": tensor("BF16", 100, 32)}
    for i in range(LAYERS):
        found[f"model.layers.{i}.mlp.up_proj.weight"] = tensor("BF16", 64, 32)
        found[f"model.layers.{i}.mlp.up_proj.bias"] = tensor("BF16", 64)
        found[f"model.layers.{i}.norm.weight"] = tensor("BF16", 32)
    return found


def packed_tensors(bits: int) -> dict:
    """The same with packed projections: one group of 32 inputs."""
    found = {"model.embed_tokens.weight": tensor("BF16", 100, 32)}
    for i in range(LAYERS):
        start = f"model.layers.{i}.mlp.up_proj"
        found[f"{start}.qweight"] = tensor("I32", bits, 64)
        found[f"{start}.scales"] = tensor("F16", 1, 64)
        found[f"{start}.qzeros"] = tensor("I32", 1, 64 * bits // 32)
        found[f"{start}.bias"] = tensor("BF16", 64)
        found[f"model.layers.{i}.norm.weight"] = tensor("BF16", 32)
    return found


def adapter_tensors(rank: int) -> dict:
    found = {}
    for i in range(LAYERS):
        found[f"layers.{i}.lora_A"] = tensor("F16", rank, 32)
        found[f"layers.{i}.lora_B"] = tensor("F16", 64, rank)
    return found


def evaluation(
    results: Path, model: str, variant: str, task: str, value, each=None, **more
) -> None:
    primary = "perplexity" if "perplexity" in task else "acc_norm"
    up = primary != "perplexity"
    error = 0.01 if up else None
    content = {
        "task": task,
        "metrics": {
            primary: {"value": value, "stderr": error, "higher_is_better": up},
            "other": {"value": 0.25, "stderr": None, "higher_is_better": True},
        },
        "primary": primary,
        "samples": 200,
        "available": 200,
        "seconds": 12.5,
        "memory_bytes": {"loading": 700_000_000, "prompt": 600_000_000},
        "prompt_tokens": 512,
        "peak_memory_bytes": 900_000_000,
        "planned_memory_bytes": 800_000_000,
        "device": "cpu",
        "dtype": "float32",
        "versions": {"lm_eval": "0.4.13"},
    }
    folder = results / "evaluations" / model / variant / task
    save(folder / "results.json", content | more)
    save(folder / "samples.json", {} if each is None else {primary: each})


def entry(model: str, variant: str, compression=None, rank=None) -> dict:
    return {
        "model": model,
        "variant": variant,
        "compression": compression,
        "adapter": rank and "eora",
        "rank": rank,
        "adapter_bits": rank and 16,
    }


def make(results: Path, values: dict[str, tuple], model: str = "tiny") -> dict:
    """Files and plan for variants named original, w2g32, w4g32 or w2g32+r8 and the like."""
    manifest(results / "models" / model / "manifest.json", original_tensors(), torch="2.13.0")
    variants = []
    for name, scores in values.items():
        compression, _, rank = name.partition("+r")
        rank = int(rank) if rank else None
        if compression == "original":
            compression = None
        else:
            path = results / "compressed" / model / compression / "manifest.json"
            manifest(path, packed_tensors(int(compression[1])), torch="2.12.0")
        if rank:
            folder = results / "adapters" / model / compression / "eora" / f"r{rank}-16bit"
            manifest(folder / "manifest.json", adapter_tensors(rank))
        variants.append(entry(model, name, compression, rank))
        for task, value in zip(PLAN["tasks"], scores, strict=True):
            evaluation(results, model, name, task, value)
    return PLAN | {"variants": variants}


USUAL = {
    "original": (0.60, 10.0),
    "w2g32": (0.40, 40.0),
    "w2g32+r8": (0.55, 20.0),
    "w4g32": (0.55, 21.0),
}


def cell(frame: pd.DataFrame, variant: str, column: str, task: str = "arc-easy"):
    rows = frame[(frame["variant"] == variant) & (frame["task"] == task)]
    assert len(rows) == 1
    return rows.iloc[0][column]


def page(results: Path, plan: dict) -> str:
    report.write(report.build(results, plan), plan, results / "out")
    return (results / "out" / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<(style|script)>.*?</\1>|<wbr>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", body))


class Links(HTMLParser):
    """Collects what a page would load, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        for key, value in attrs:
            if key.rpartition(":")[2] in ("src", "href", "srcset", "action", "data"):
                self.targets.append(value)
            elif key == "id":
                self.ids.append(value)


# --- sizes -------------------------------------------------------------------------------


def test_bytes_are_exact(tmp_path):
    frame = report.build(tmp_path, make(tmp_path, USUAL))
    assert cell(frame, "original", "bytes") == ORIGINAL == 14_976
    assert cell(frame, "w2g32", "bytes") == W2 == 8_096
    assert cell(frame, "w4g32", "bytes") == W4 == 9_152
    assert cell(frame, "w2g32+r8", "bytes") == W2 + RANK8 == 11_168


def test_effective_bits_are_exact(tmp_path):
    frame = report.build(tmp_path, make(tmp_path, USUAL))
    weights = LAYERS * 64 * 32
    packed = LAYERS * (2 * 64 * 4 + 64 * 2 + 4 * 4)  # neither bias nor norm
    assert cell(frame, "original", "effective_bits") == 16
    assert cell(frame, "w2g32", "effective_bits") == 8 * packed / weights == 2.5625
    assert cell(frame, "w2g32+r8", "effective_bits") == 8 * (packed + RANK8) / weights == 8.5625


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", [3, 5], 60), ("BF16", [7], 14), ("I64", [], 8), ("F4", [3], 2), ("U8", [0], 0)],
)
def test_tensor_bytes(dtype, shape, size):
    assert reading.tensor_bytes({"dtype": dtype, "shape": shape}) == size


def test_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="Q7"):
        reading.tensor_bytes({"dtype": "Q7", "shape": [1]})


def test_parts_are_told_whatever_a_file_calls_its_blocks():
    """GPT-2's own files say ``h.0``, those that transformers saves ``transformer.h.0``."""
    original = {"h.0.up.weight": tensor("F16", 4, 2), "h.0.norm.weight": tensor("F16", 2)}
    packed = {
        "transformer.h.0.up.qweight": tensor("U8", 2),
        "transformer.h.0.up.scales": tensor("F16", 1),
        "transformer.h.0.up.bias": tensor("F16", 4),
        "transformer.h.0.norm.weight": tensor("F16", 2),
        "transformer.wte.weight": tensor("F16", 3, 2),
    }
    models = [{"tensors": {"model/f": some}} for some in (original, packed)]
    found = reading.bytes_by_part(models[1])
    assert found == {"weight_bytes": 2, "scale_bytes": 2, "other_bytes": 8 + 4 + 12}
    assert reading.effective_bits(*models, adapter_bytes=4) == 8 * (2 + 2 + 4) / 8


# --- comparisons -------------------------------------------------------------------------


def test_recovered(tmp_path):
    frame = report.build(tmp_path, make(tmp_path, USUAL))
    assert cell(frame, "w2g32+r8", "recovered") == pytest.approx(0.75)
    # From 40 to 20 on the way from 40 to 10: half in nats, two thirds otherwise.
    ppl = cell(frame, "w2g32+r8", "recovered", "heldout-perplexity")
    assert ppl == pytest.approx(0.5)
    for variant in ("original", "w2g32", "w4g32"):
        assert pd.isna(cell(frame, variant, "recovered"))


@pytest.mark.parametrize(
    ("original", "compressed", "adapted", "share"),
    [
        (0.6, 0.6, 0.7, None),
        (0.6, 0.65, 0.7, None),
        (0.6, math.nan, 0.5, None),
        (0.6, 0.4, math.inf, None),
        (0.6, 0.4, 0.3, -0.5),
        (0.6, 0.4, 0.7, 1.5),
    ],
)
def test_recovered_share(original, compressed, adapted, share):
    found = comparing.recovered_share(original, compressed, adapted, "acc", True)
    assert found == (None if share is None else pytest.approx(share))


def test_cheaper_alternative(tmp_path):
    frame = report.build(tmp_path, make(tmp_path, USUAL))
    assert cell(frame, "w2g32+r8", "cheaper_alternative") == "w4g32"  # equal is as good
    assert pd.isna(cell(frame, "w2g32+r8", "cheaper_alternative", "heldout-perplexity"))
    assert pd.isna(cell(frame, "w2g32", "cheaper_alternative"))


def test_cheaper_alternative_is_the_smallest_and_never_larger(tmp_path):
    values = {**USUAL, "w2g32": (0.55, 40.0), "w2g32+r1": (0.54, 30.0), "w2g32+r64": (0.59, 9.0)}
    frame = report.build(tmp_path, make(tmp_path, values))
    assert cell(frame, "w2g32+r8", "cheaper_alternative") == "w2g32"
    # The original is better than rank 64, and smaller.
    assert cell(frame, "w2g32+r64", "cheaper_alternative") == "original"
    # w4g32 is better than rank 1, but larger.
    ppl = cell(frame, "w2g32+r1", "cheaper_alternative", "heldout-perplexity")
    assert pd.isna(ppl)


def test_broken_variants_lose(tmp_path):
    values = {"original": (0.6, 10.0), "w4g32": (0.5, 11.0), "w2g32": ("NaN", math.inf)}
    values["w2g32+r8"] = (math.nan, math.nan)
    plan = make(tmp_path, values)
    frame = report.build(tmp_path, plan)
    assert cell(frame, "w2g32+r8", "cheaper_alternative") == "w4g32"
    assert pd.isna(cell(frame, "w2g32+r8", "recovered"))
    assert not cell(frame, "w2g32", "best_for_size")
    html = text_of(page(tmp_path, plan))
    assert "Not drawn: w2g32 (nan), w2g32+r8 (nan)" in html
    assert "Not drawn: w2g32 (inf), w2g32+r8 (nan)" in html
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [r["value"] for r in rows if r["variant"] == "w2g32"] == ["nan", "inf"]


def test_best_for_size(tmp_path):
    frame = report.build(tmp_path, make(tmp_path, USUAL))
    best = frame[frame["best_for_size"] & (frame["task"] == "arc-easy")]["variant"]
    # Rank 8 only equals the smaller w4g32.
    assert best.tolist() == ["original", "w2g32", "w4g32"]


@pytest.mark.parametrize(
    ("first", "second", "noise"),
    [((0.50, 0.01), (0.52, 0.01), True), ((0.50, 0.01), (0.53, 0.01), False),
     ((0.50, None), (0.50, 0.01), False)],
)  # fmt: skip
def test_noise_without_samples(first, second, noise):
    a, b = ({"value": value, "stderr": error, "each": None} for value, error in (first, second))
    assert comparing.is_noise(a, b) is noise


def test_answers_are_compared_question_by_question():
    """By McNemar's exact test: of the questions that one alone gets right."""
    a = [1.0] * 10 + [0.0] * 2 + [1.0] * 100 + [0.0] * 50
    b = [0.0] * 10 + [1.0] * 2 + [1.0] * 100 + [0.0] * 50
    first, second = {"each": a}, {"each": b}
    exact = stats.binomtest(10, 12).pvalue
    assert comparing.p_value(first, second) == pytest.approx(exact, abs=0.015)
    assert comparing.p_value(first, first) == 1
    assert comparing.p_value(first, {"each": [0.0, *a[1:]]}) == 1
    assert comparing.is_noise(first, second) is False
    assert comparing.p_value(first, {"each": b[1:]}) is None


def test_a_small_difference_is_no_noise_if_every_sample_has_it():
    """Standard errors of either side alone would hide it."""
    losses = np.linspace(1, 5, 40)
    a = {"each": losses.tolist(), "value": 3.0, "stderr": 0.19}
    b = {"each": (losses - 0.01).tolist(), "value": 2.99, "stderr": 0.19}
    assert not comparing.is_noise(a, b)
    assert comparing.is_noise({**a, "each": None}, {**b, "each": None})


def test_an_adapters_p_value_is_against_its_compression(tmp_path):
    plan = make(tmp_path, USUAL)
    for variant, each in (("w2g32", [0.0] * 8 + [1.0]), ("w2g32+r8", [1.0] * 8 + [0.0])):
        evaluation(tmp_path, "tiny", variant, "arc-easy", sum(each) / 9, each)
    frame = report.build(tmp_path, plan)
    assert cell(frame, "w2g32+r8", "p_value") == pytest.approx(
        stats.binomtest(8, 9).pvalue, abs=0.001
    )
    assert pd.isna(cell(frame, "w2g32", "p_value"))
    assert pd.isna(cell(frame, "w2g32+r8", "p_value", "heldout-perplexity"))


def test_budgets_are_few_and_end_with_the_largest():
    rows = [
        {"task": "t", "variant": str(i), "compression": "c" if i < 40 else None, "adapter": None}
        | {"bytes": 1_000_003 + 70_001 * i, "value": i / 50, "higher_is_better": True}
        for i in range(41)
    ]
    found = verdict.budgets(rows)
    assert len(found) <= verdict.MOST_BUDGETS
    assert found[0] >= rows[0]["bytes"]
    assert found[-1] == rows[-1]["bytes"]


# --- files -------------------------------------------------------------------------------


def test_csv(tmp_path):
    plan = make(tmp_path, USUAL)
    report.write(report.build(tmp_path, plan), plan, tmp_path / "out")
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == comparing.CSV_COLUMNS
    assert len(rows) == len(USUAL) * len(PLAN["tasks"])
    assert rows[4] == {
        "model": "tiny",
        "variant": "w2g32+r8",
        "compression": "w2g32",
        "bits": "2",
        "group_size": "32",
        "adapter": "eora",
        "method": "eora",
        "rank": "8",
        "adapter_bits": "16",
        "task": "arc-easy",
        "metric": "acc_norm",
        "value": "0.55",
        "stderr": "0.01",
        "higher_is_better": "True",
        "samples": "200",
        "bytes": "11168",
        "weight_bytes": str(LAYERS * 2 * 64 * 4),
        "scale_bytes": str(LAYERS * (64 * 2 + 4 * 4)),
        "other_bytes": str(EMBED + LAYERS * (64 * 2 + 32 * 2)),
        "adapter_bytes": str(RANK8),
        "effective_bits": "8.5625",
        "recovered": rows[4]["recovered"],
        "recovered_from": "w2g32",
        "p_value": "",
        "cheaper_alternative": "w4g32",
        "seconds": "12.5",
        "loading_memory_bytes": "700000000",
        "prompt_memory_bytes": "600000000",
        "peak_memory_bytes": "900000000",
        "planned_memory_bytes": "800000000",
        "device": "cpu",
    }
    assert rows[1]["stderr"] == rows[1]["rank"] == rows[1]["recovered"] == ""
    same = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [list(row) for row in same] == [comparing.CSV_COLUMNS] * len(rows)
    assert same[4]["recovered"] == pytest.approx(float(rows[4]["recovered"]), rel=1e-12)
    assert same[4]["bytes"] == 11168 and same[4]["higher_is_better"] is True
    assert same[1]["rank"] is None


def test_remake_is_byte_identical(tmp_path):
    plan = make(tmp_path, USUAL)
    names = ["report.html", "summary.csv", "summary.json"]
    report.write(report.build(tmp_path, plan), plan, tmp_path / "a")
    report.write(report.build(tmp_path, plan), plan, tmp_path / "b" / "c")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / "c" / name).read_bytes()
    report.write(report.build(tmp_path, plan), plan, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names  # nothing left over


def test_figures_bear_no_date_and_no_style_sheet(tmp_path):
    plan = make(tmp_path, USUAL)
    rows = report.build(tmp_path, plan).query("task == 'arc-easy'").to_dict("records")
    assert "date>" not in figures.draw(rows, figures.looks(rows))
    html = page(tmp_path, plan)
    assert html.count("<style") == 1 and "<metadata" not in html


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "summary.csv"
    target.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pages.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pages.write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_missing_results_are_named(tmp_path):
    plan = make(tmp_path, USUAL)
    gone = tmp_path / "evaluations" / "tiny" / "w2g32" / "arc-easy" / "results.json"
    gone.unlink()
    with pytest.raises(ValueError, match=re.escape(str(gone))):
        report.build(tmp_path, plan)


@pytest.mark.parametrize("content", ["{", "[]", '{"tensors": {}}'])
def test_bad_manifest_is_named(tmp_path, content):
    plan = make(tmp_path, USUAL)
    bad = tmp_path / "compressed" / "tiny" / "w2g32" / "manifest.json"
    bad.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        report.build(tmp_path, plan)


def test_bad_primary_metric_is_named(tmp_path):
    plan = make(tmp_path, USUAL)
    evaluation(tmp_path, "tiny", "w2g32", "arc-easy", 0.4, primary="f1")
    with pytest.raises(ValueError, match=r"f1.*w2g32.arc-easy.results\.json"):
        report.build(tmp_path, plan)


def test_mixed_metrics_are_refused(tmp_path):
    plan = make(tmp_path, USUAL)
    evaluation(tmp_path, "tiny", "w2g32", "arc-easy", 0.4, primary="other")
    with pytest.raises(ValueError, match="more than one primary metric"):
        report.build(tmp_path, plan)


# --- the page ----------------------------------------------------------------------------


def test_page_loads_nothing_and_has_unique_ids(tmp_path):
    html = page(tmp_path, make(tmp_path, USUAL))
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert all(t.startswith(("#", "data:")) for t in re.findall(r"url\(['\"]?([^)]*)", html))
    found = Links()
    found.feed(html)
    assert found.targets
    assert all(target.startswith(("#", "data:")) for target in found.targets)
    assert len(found.ids) == len(set(found.ids))
    assert {t[1:] for t in found.targets if t.startswith("#")} <= set(found.ids)


def test_names_are_escaped(tmp_path):
    nasty = "<b>&\"'$x$"
    plan = make(tmp_path, USUAL, model="tiny")
    for name in ("models", "compressed", "adapters", "evaluations"):
        # A slash cannot be in a folder name, so the nasty name has none.
        (tmp_path / name / "tiny").rename(tmp_path / name / nasty)
    variants = [v | {"model": nasty} for v in plan["variants"]]
    calibrations = {"<i>": {"dataset": "<script>alert(1)</script>"}}
    html = page(tmp_path, plan | {"variants": variants, "calibrations": calibrations})
    assert "<b>" not in html and "<i>" not in html and "<script>alert" not in html
    assert "&lt;b&gt;&amp;&#34;&#39;$x$" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_names_are_escaped_in_figures_and_sentences(tmp_path):
    plan = make(tmp_path, USUAL)
    nasty = "<b>&w4"
    (tmp_path / "compressed" / "tiny" / "w4g32").rename(tmp_path / "compressed" / "tiny" / nasty)
    (tmp_path / "evaluations" / "tiny" / "w4g32").rename(tmp_path / "evaluations" / "tiny" / nasty)
    plan["variants"][3] |= {"variant": nasty, "compression": nasty}
    html = page(tmp_path, plan)
    assert "<b>" not in html
    for part in re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL):
        assert "&lt;b&gt;&amp;w4" in part
    assert "<strong>&lt;b&gt;&amp;w4</strong> needs" in html


def test_verdict(tmp_path):
    text = text_of(page(tmp_path, make(tmp_path, USUAL)))
    assert "No adapter pays for itself here: for the only one there is" in text
    assert (
        "w2g32: the best adapter, eora r8 16-bit, wins back 75 % of the loss on arc-easy and 50 %"
        " on heldout-perplexity, for 3.07 kB more (+37.9 %)."
        " But on arc-easy w4g32 is at least as good and no larger." in text
    )
    assert "w2g32+r8 needs 11.2 kB; w4g32 needs 9.15 kB and gets 0.550 instead of 0.550" in text


def test_verdict_names_a_smaller_adapter_that_is_nearly_as_good(tmp_path):
    values = {"original": (0.6, 10.0), "w2g32": (0.4, 40.0)}
    values |= {"w2g32+r8": (0.58, 20.0), "w2g32+r4": (0.57, 20.0), "w2g32+r2": (0.45, 35.0)}
    text = text_of(page(tmp_path, make(tmp_path, values)))
    assert "eora r4 16-bit brings 96 % of that gain for 1.54 kB." in text
    assert "Each of the 3 adapters pays for itself" in text
    assert "None: no variant without adapter is as good" in text


def test_nothing_lost_and_harmful_adapters_are_said(tmp_path):
    values = {"original": (0.4, 40.0), "w2g32": (0.4, 40.0), "w2g32+r8": (0.4, 40.0)}
    plan = make(tmp_path / "a", values)
    assert "w2g32 loses nothing that could be measured" in text_of(page(tmp_path / "a", plan))
    values = {"original": (0.6, 10.0), "w2g32": (0.4, 40.0), "w2g32+r8": (0.3, 50.0)}
    plan = make(tmp_path / "b", values)
    text = text_of(page(tmp_path / "b", plan))
    assert "does not help: it wins back −50 % of the loss on arc-easy" in text
    assert "w2g32 (the same model without the adapter)" in text


def test_page_shows_settings_tools_and_other_metrics(tmp_path):
    text = text_of(page(tmp_path, make(tmp_path, USUAL)))
    for words in ("torch2.12.0, 2.13.0", "lm_eval0.4.13", "group size", "seqlen", "float32"):
        assert words in text
    assert "other" in text and "0.250" in text
    assert "50.0 s" in text and "900.0 MB" in text


def test_table_keeps_a_compression_together(tmp_path):
    order = ["w4g32", "w2g32+r8", "original", "w2g32+r4", "w2g32"]
    frame = report.build(tmp_path, make(tmp_path, {name: USUAL["w2g32"] for name in order}))
    table = pages.table_rows(frame.to_dict("records"), PLAN["tasks"])
    found = [row["variant"] for row in table]
    assert found == ["w4g32", "w2g32", "w2g32+r4", "w2g32+r8", "original"]
    assert [row["variant"] for row in table if row["new_group"]] == ["w4g32", "w2g32"]


def test_residuals_are_shares_by_kind_of_layer_and_block():
    """By hand: errors of 100 and 25 left of 100 are 50 %; what is narrower is whole beyond."""
    left = residuals.shares(
        {
            "model.layers.0.mlp.down_proj": [100.0, 25.0, 4.0],
            "model.layers.1.mlp.down_proj": [16.0, 4.0],
            "model.layers.0.mlp.experts.0.up_proj": [1.0, 0.25, 0.0],
            "model.layers.0.mlp.experts.1.up_proj": [1.0, 1.0, 1.0],
            "model.layers.1.self_attn.q_proj": [0.0, 0.0, 0.0],
        }
    )
    assert left.to_dict("index") == {
        ("down", 0): {0: 1.0, 1: 0.5, 2: 0.2},
        ("down", 1): {0: 1.0, 1: 0.5, 2: 0.0},
        ("expert up", 0): {0: 1.0, 1: 0.75, 2: 0.5},
        ("q", 1): {0: 0.0, 1: 0.0, 2: 0.0},
    }
    assert residuals.means(left).loc["down"].tolist() == pytest.approx([1.0, 0.5, 0.1])


def test_page_shows_what_each_rank_leaves_where_it_is_kept(tmp_path):
    plan = make(tmp_path, USUAL)
    assert "What each rank leaves" not in page(tmp_path, plan)
    made = tmp_path / "adapters" / "tiny" / "w2g32" / "eora" / "r8-16bit"
    curves = {f"model.layers.{i}.mlp.up_proj": [4.0] * (8 - i) + [1.0] * (1 + i) for i in (0, 1)}
    save(made / "residuals.json", curves)
    html = page(tmp_path, plan)
    assert "What each rank leaves of the error in tiny" in html
    assert "rank 8: up 50\N{NO-BREAK SPACE}%" in html
    found = Links()
    found.feed(html)
    assert len(found.ids) == len(set(found.ids))


def test_uneven_samples_are_marked(tmp_path):
    plan = make(tmp_path, USUAL)
    assert "not the same for all" not in text_of(page(tmp_path, plan))
    evaluation(tmp_path, "tiny", "w2g32", "arc-easy", 0.4, samples=100)
    assert "200, 100 not the same for all" in text_of(page(tmp_path, plan))


def test_figures_have_words_and_a_log_axis_only_for_far_perplexities(tmp_path):
    near = {"original": (0.1, 10.0), "w2g32": (0.9, 40.0)}
    html = page(tmp_path / "near", make(tmp_path / "near", near))
    assert (
        'aria-label="acc_norm on arc-easy against size (higher is better): original 0.100' in html
    )
    assert html.count("Logarithmic axis") == 0
    far = {"original": (0.1, 10.0), "w2g32": (0.9, 51.0)}
    html = page(tmp_path / "far", make(tmp_path / "far", far))
    assert html.count("Logarithmic axis") == 1


@pytest.mark.parametrize("only", ["original", "w2g32", "w2g32+r8"])
def test_one_variant_alone(tmp_path, only):
    plan = make(tmp_path, {only: USUAL[only]})
    html = page(tmp_path, plan)
    assert html.count('role="img"') == 2
    assert pd.isna(report.build(tmp_path, plan).loc[0, "recovered"])


def test_one_task_several_models_and_missing_numbers(tmp_path):
    first = make(tmp_path, USUAL, model="tiny")
    second = make(tmp_path, USUAL, model="small")
    evaluation(
        tmp_path, "small", "w2g32", "arc-easy", None, samples=None, seconds=None, device=None,
        peak_memory_bytes=None,
    )  # fmt: skip
    plan = first | {"variants": first["variants"] + second["variants"], "tasks": ["arc-easy"]}
    html = page(tmp_path, plan)
    assert html.count("<figure>") == 2
    assert 'id="model-2"' in html
    assert "Not drawn: w2g32 (nan)" in text_of(html)


@pytest.mark.parametrize("models, unfolded", [(4, 4), (5, 0)])
def test_many_models_answers_come_without_their_tables(tmp_path, models, unfolded):
    names = [f"m{i}" for i in range(models)]
    plans = [make(tmp_path, {"original": (0.6, 10.0), "w2g32": (0.4, 40.0)}, n) for n in names]
    plan = plans[0] | {"variants": [v for p in plans for v in p["variants"]]}
    html = page(tmp_path, plan)
    assert html.count("Best within a budget</h4>") == models
    assert html.count("<details open>") == unfolded


def test_all_values_broken_or_no_variants(tmp_path):
    plan = make(tmp_path, {"original": (math.nan, math.inf), "w2g32": (math.nan, math.nan)})
    text = text_of(page(tmp_path, plan))
    assert "No variant has a finite value." in text
    assert "names no variants" in text_of(page(tmp_path, plan | {"variants": []}))


@pytest.mark.parametrize(
    ("size", "words"),
    [(999, "999 B"), (1_500, "1.50 kB"), (131_240_000, "131.2 MB"), (2_345_000_000, "2.35 GB")],
)
def test_show_bytes(size, words):
    assert show.show_bytes(size).replace(show.NBSP, " ") == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.51234, "0.512"), (15.5, "15.50"), (12345.6, "12,346"), (2.5e9, "2.50e+09"),
     (math.nan, "nan"), (-math.inf, "−inf"), (-0.25, "−0.250")],
)  # fmt: skip
def test_show_value(value, words):
    assert show.show_value(value) == words


def test_a_figure_by_rank_is_drawn_where_there_are_several(tmp_path):
    """Its axis has rank 0 (without adapter) and each that was judged; one rank alone has none."""
    one = page(tmp_path / "one", make(tmp_path / "one", USUAL))
    assert "What each rank brings" not in one
    plan = make(tmp_path / "two", USUAL | {"w2g32+r16": (0.57, 18.0), "w2g32+r4": (0.5, 25.0)})
    two = page(tmp_path / "two", plan)
    drawn = two.split("What each rank brings")[1].split("</details>")[0].split("<figure>")[1:]
    assert len(drawn) == len(PLAN["tasks"])
    for figure in drawn:
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
        assert {"0", "4", "8", "16", "rank of the adapter (0: without)"} <= set(texts)
        assert "r8" not in texts and "w2g32" in texts


def test_ranks_that_lie_close_together_are_not_all_named():
    """Their names would lie on each other; the points are drawn all the same."""
    assert figures.spaced([32, 48, 64, 65, 80, 128]) == [32, 48, 64, "", "", 128]


def test_page_shows_what_memory_was_taken_and_planned(tmp_path):
    html = page(tmp_path, make(tmp_path, USUAL))
    used = html.split("Where the bytes of")[1].split("</details>")[0]
    assert used.count("700.0\N{NO-BREAK SPACE}MB") == used.count("600.0\N{NO-BREAK SPACE}MB") == 4
    assert "one prompt of 512 tokens" in used
    made = html.split('id="made-title"')[1]
    assert "900.0\N{NO-BREAK SPACE}MB" in made and "800.0\N{NO-BREAK SPACE}MB" in made


def test_page_says_what_was_not_run(tmp_path):
    plan = make(tmp_path, USUAL)
    adapter = {"ranks": [8], "max_rank": 64, "bits": [16], "method": "eora"}
    plan |= {"adapters": {"eora": adapter}}
    curves = {"model.layers.0.q": [1.0] * 65, "model.layers.0.k": [1.0] * 33}
    save(tmp_path / "adapters" / "tiny" / "w2g32" / "eora" / "r8-16bit" / "residuals.json", curves)
    evaluation(tmp_path, "tiny", "original", "arc-easy", 0.6, available=2376)
    told = page(tmp_path, plan).split("What was not run")[1].split("</ul>")[0]
    assert re.findall(r"<li>(.*)</li>", told) == [
        "arc-easy: 200 of 2,376 samples were judged. The rest: remove tasks.arc-easy.limit.",
        "eora: fitted up to rank 64, judged at 8. Any other needs no new fit: add it to "
        "adapters.eora.ranks.",
        "eora: judged in 16 bits alone. In 4 bits an adapter takes about a quarter of the bytes: "
        "add 4 to adapters.eora.bits.",
        "No adapter was fitted by diagonal and svd. For a comparison at equal rank add an entry to "
        "adapters with that method: it shares the second moments.",
    ]
    whole = {"ranks": [8, 64], "max_rank": 64, "bits": [4, 16]}
    plan |= {"adapters": {m: whole | {"method": m} for m in ("eora", "svd", "diagonal")}}
    evaluation(tmp_path, "tiny", "original", "arc-easy", 0.6)
    assert "What was not run" not in page(tmp_path, plan)


def test_a_compression_made_around_an_adapter_is_compared_with_its_first_rounds(tmp_path):
    """It has no row of its own without adapter: what it recovers is of the other's loss."""
    values = {"original": (0.6, 10.0), "w2g32": (0.4, 40.0), "w4g32+r8": (0.55, 20.0)}
    around = PLAN["compressions"]["w4g32"] | {"around": {"compression": "w2g32"}}
    plan = make(tmp_path, values)
    plan |= {"compressions": PLAN["compressions"] | {"w4g32": around}}
    frame = report.build(tmp_path, plan)
    assert cell(frame, "w4g32+r8", "recovered") == pytest.approx(0.75)
    assert cell(frame, "w4g32+r8", "recovered_from") == "w2g32"
    html = page(tmp_path, plan)
    text = text_of(html)
    assert "wins back 75 % of the loss of w2g32 on arc-easy" in text
    assert "made around an adapter" in text
    assert "made around an adapter" not in text_of(page(tmp_path, plan | {"compressions": {}}))


def test_a_gain_beyond_the_loss_is_told_in_words(tmp_path):
    """Of a small loss a share has no meaning: 5,126 % would be noise with four digits."""
    plan = make(tmp_path, USUAL | {"w2g32+r8": (0.7, 20.0)})
    text = text_of(page(tmp_path, plan))
    assert "wins back more than all of the loss on arc-easy and 50 % on" in text


def test_a_fine_tuned_adapter_has_its_losses_and_its_own_folder(tmp_path):
    plan = make(tmp_path, USUAL)
    assert "Losses of fine-tuning" not in page(tmp_path, plan)
    tuned = plan["variants"][2] | {"tuned": True}
    assert tuned["variant"] == "w2g32+r8"
    folder = tmp_path / "adapters" / "tiny" / "w2g32" / "eora" / "r8-tuned"
    manifest(folder / "manifest.json", adapter_tensors(4))
    losses = [{"step": i, "loss": 3.0 - i / 10, "learning_rate": 1e-4} for i in range(1, 21)]
    save(folder / "losses.json", losses)
    plan |= {"variants": [*plan["variants"][:2], tuned, *plan["variants"][3:]]}
    frame = report.build(tmp_path, plan)
    assert cell(frame, "w2g32+r8", "adapter_bytes") == RANK8 / 2
    html = page(tmp_path, plan)
    drawn = html.split("Losses of fine-tuning in tiny")[1].split("</details>")[0]
    assert "Loss of fine-tuning by step: w2g32+r8 from 2.90 to 1.05." in drawn
    assert drawn.count("<svg") == 1
