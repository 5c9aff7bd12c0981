"""config.yaml, its schema and the examples: what is right passes, what is wrong is explained."""

import copy
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from eora import config as cfg
from eora import stages

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = cfg.load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
SHIPPED = ROOT / "config.yaml"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

BASE = """
models:
  m: {hub: owner/m, revision: main}
datasets:
  d: {hub: owner/d, revision: main}
  e: {hub: owner/e, revision: main}
calibrations:
  c: {dataset: d, samples: 4, seqlen: 8}
compressions:
  w2: {bits: 2, calibration: c}
adapters:
  e: {calibration: c, ranks: [4, 8]}
tasks:
  t: {lm_eval: arc_easy}
  p: {perplexity: d}
"""
REMOVE = object()
AROUND = {"compression": "w2", "adapter": "e", "rank": 4}
AGAIN = {"bits": 2, "calibration": "c", "around": AROUND}
TUNED = {
    "calibration": "c", "ranks": [4], "bits": [16], "tune": {"calibration": "c", "steps": 5}
}  # fmt: skip
RESCALED = {"method": "rescale", "compression": "w2", "calibration": "c", "rank": 4}
EXISTING = {"method": "existing", "model": "m", "checkpoint": {"hub": "o/q", "revision": "main"}}


def mixed(**shares):
    return {"mix": shares, "samples": 4, "seqlen": 8}


def put(config, at, value):
    """Set, or remove, what lies at a path: dotted text, or a tuple where a key has a dot."""
    *parents, key = at.split(".") if isinstance(at, str) else at
    for parent in parents:
        config = config.setdefault(parent, {})
    if value is REMOVE:
        config.pop(key, None)
    else:
        config[key] = value


def changed(*changes):
    config = yaml.safe_load(BASE)
    for at, value in changes:
        put(config, at, value)
    return config


def complaints(config):
    """The lines of the error's one message, without their bullets."""
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.validate(config, SCHEMA)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("- ") for line in lines)
    return [line.removeprefix("- ") for line in lines]


def test_the_base_of_these_tests_is_valid():
    cfg.validate(changed(), SCHEMA)


MISTAKES = {
    # Unknown keys.
    "misspelt section": ("taks", {}, "taks: unknown key; did you mean tasks?"),
    "misspelt key": ("compressions.w2.group_sise", 32, "did you mean group_size?"),
    "key of nothing": ("runtime", {"colour": 1}, "runtime.colour: unknown key; known: device, "),
    # Missing keys.
    "no tasks": ("tasks", REMOVE, "tasks: missing; it is needed: how every model"),
    "no samples": ("calibrations.c.samples", REMOVE, "missing; it is needed: number of samples"),
    "no bits": ("compressions.w2.bits", REMOVE, "missing; it is needed: bits a weight"),
    # Wrong types.
    "text for a number": ("calibrations.c.samples", "many", "many is not a whole number"),
    "fraction": ("calibrations.c.samples", 4.5, "4.5 is not a whole number"),
    "truth for a number": ("calibrations.c.samples", True, "true is not a whole number"),
    "number for truth": ("compressions.w2.sym", 1, "1 is not true or false"),
    "number for text": ("models.m.revision", 1234567, "1234567 is not text, put it in quotes"),
    "date for text": ("models.m.revision", date(2025, 1, 2), "2025-01-02 is not text, put it in"),
    "list for text": ("models.m.revision", ["a"], "[a] is not text; commit"),
    "number for list": ("adapters.e.ranks", 32, "32 is not a list, write [32]"),
    "text for section": ("models.m", "owner/m", "owner/m is not a section (keys with values"),
    "quoted text for section": ("models", "0:", "'0:' is not a section (keys with values below it"),
    "list for section": ("tasks", ["t"], "[t] is not a section (keys with values below it)"),
    "section for list": ("adapters.e.ranks", {"a": 4}, "a section is not a list; ranks to make"),
    "number for files": ("datasets.d.data_files", 3, "3 is not text or a list; the files"),
    # Out of range.
    "too small": ("calibrations.c.samples", 0, "0 is less than the minimum of 1; number of"),
    "odd bits": ("compressions.w2.bits", 5, "5 is none of 2, 3, 4, 8; bits a weight"),
    "endless bits": ("compressions.w2.bits", float("inf"), ".inf is none of 2, 3, 4, 8; bits a"),
    "odd choice": ("adapters.e.method", "EoRA", "EoRA is none of eora, diagonal, svd; metric"),
    "odd device": (
        "runtime",
        {"device": "gpu"},
        "runtime.device: gpu does not fit; auto (a free CUDA",
    ),
    "odd repository": ("models.m.hub", "a b", "a b does not fit; hub repository, owner/name"),
    "no ranks": ("adapters.e.ranks", [], "[] should be non-empty; ranks to make"),
    "one rank twice": ("adapters.e.ranks", [4, 4], "non-unique elements; ranks to make"),
    "rank 0": ("adapters.e.ranks", [0], "adapters.e.ranks.0: 0 is less than the minimum of 1"),
    "half a range": ("datasets.d.rows", [3], "[3] is too short; take rows [first, end)"),
    "empty range": ("datasets.d.rows", [5, 5], "[5, 5] is empty; give [first, end) with first"),
    "no model": ("models", {}, "models: {} should be non-empty; the models to compress"),
    "empty text": ("results", "", "results: '' should be non-empty; folder that all results"),
    # Names of what is not there.
    "dataset of a calibration": ("calibrations.c.dataset", "x", "no entry 'x'; known: d, e"),
    "calibration of a compression": ("compressions.w2.calibration", "x", "no entry 'x'; known: c"),
    "calibration of an adapter": ("adapters.e.calibration", "cc", "'cc'; did you mean c?"),
    "dataset of a task": ("tasks.t.dataset", "dd", "'dd'; did you mean d?"),
    "text of a perplexity": ("tasks.p.perplexity", "x", "datasets has no entry 'x'; known: d, e"),
    # Settings that clash.
    "asymmetric in auto_gptq": (
        "compressions.w2.format",
        "auto_gptq",
        "asymmetric 2-bit weights cannot be loaded back",
    ),
    "asymmetric 4 bits": (
        "compressions.w2.bits",
        4,
        "AutoRound packs asymmetric 4-bit weights for AWQ kernels, which are not installed",
    ),
    "rank above max_rank": ("adapters.e.max_rank", 6, "8 is above max_rank 6; raise max_rank"),
    "no calibration": ("compressions.w2.calibration", REMOVE, "missing; it is needed: a packed"),
    "sparsity of AutoRound": ("compressions.w2.sparsity", "0.5", "goes with sparsegpt, wanda, not"),
    "iters of GPTQ": (
        "compressions.w2",
        {"method": "gptq", "bits": 3, "iters": 20, "calibration": "c"},
        "goes with autoround, not with gptq; remove it",
    ),
    "nothing is left": (
        "compressions.w2",
        {"method": "wanda", "sparsity": "4:4", "calibration": "c"},
        '4 of 4 leaves nothing; take fewer, such as "2:4"',
    ),
    "no checkpoint": (
        "compressions.w2",
        {"method": "existing", "model": "m"},
        "missing; it is needed: where an existing checkpoint (",
    ),
    "checkpoint of an unknown model": (
        "compressions.w2",
        EXISTING | {"model": "n"},
        "models has no entry 'n'; known: m",
    ),
    "checkpoint from nowhere": (
        "compressions.w2",
        EXISTING | {"checkpoint": {}},
        "exactly one of hub, wheel and path (found none)",
    ),
    "bits of a checkpoint": (
        "compressions.w2",
        EXISTING | {"bits": 4},
        "goes with autoround, gptq, awq, sparsegpt, wanda, not with existing; remove it",
    ),
    "calibration of a checkpoint": (
        "compressions.w2",
        EXISTING | {"calibration": "c"},
        "goes with methods that calibrate, not with existing; remove it",
    ),
    "around an unknown compression": (
        "compressions.again",
        AGAIN | {"around": AROUND | {"compression": "w3"}},
        "compressions has no entry 'w3'; known: w2, again",
    ),
    "around an unknown adapter": (
        "compressions.again",
        AGAIN | {"around": AROUND | {"adapter": "x"}},
        "adapters has no entry 'x'; known: e",
    ),
    "around a rank above max_rank": (
        "compressions.again",
        AGAIN | {"around": AROUND | {"rank": 600}},
        "600 is above adapters.e.max_rank 512; raise max_rank (",
    ),
    "around itself": (
        "compressions.w2.around",
        AROUND,
        "w2 is made from itself; name one made before it",
    ),
    "scales of itself": (
        "compressions.w2",
        RESCALED,
        "w2 is made from itself; name one made before it",
    ),
    "scales of a ring": (
        "compressions",
        {"w2": RESCALED | {"compression": "w3"}, "w3": RESCALED},
        "w2 is made from itself; name one made before it",
    ),
    "scales of nothing": (
        "compressions.w2",
        {key: value for key, value in RESCALED.items() if key != "compression"},
        "missing; it is needed: what rescale fits the scales of",
    ),
    "scales of an unknown compression": (
        "compressions.again",
        RESCALED | {"compression": "w3"},
        "compressions has no entry 'w3'; known: w2, again",
    ),
    "scales of what was pruned": (
        "compressions",
        {"w2": {"method": "wanda", "calibration": "c"}, "again": RESCALED},
        "w2 is not rounded, so it has no scales; name one with bits",
    ),
    "scales beside no rank": (
        "compressions.again",
        {key: value for key, value in RESCALED.items() if key != "rank"},
        "missing; it is needed: the rank of the adapter that rescale fits scales beside",
    ),
    "bits of new scales": (
        "compressions.again",
        RESCALED | {"bits": 2},
        "goes with autoround, gptq, awq, sparsegpt, wanda, not with rescale; remove it",
    ),
    "rank of AutoRound": (
        "compressions.w2.rank",
        4,
        "goes with rescale, not with autoround; remove it",
    ),
    "around a checkpoint": (
        "compressions",
        {"w4": EXISTING, "again": AGAIN | {"around": AROUND | {"compression": "w4"}}},
        "w4 is an existing checkpoint, which belongs to one model; name one that is made of",
    ),
    "around an adapter of rescaled layers": (
        "compressions",
        {
            "w4": {"method": "awq", "bits": 4, "calibration": "c"},
            "again": AGAIN | {"around": AROUND | {"compression": "w4"}},
        },
        "w4 is made by awq, whose adapters stand beside layers that it rescaled",
    ),
    "gptq around an adapter": (
        "compressions.again",
        AGAIN | {"method": "gptq"},
        "goes with autoround, not with gptq; remove it",
    ),
    "tuned in few bits": (
        "adapters.f",
        TUNED | {"bits": [16, 4]},
        "a fine-tuned adapter is kept in 16 bits; write adapters.f.bits: [16]",
    ),
    "tuned on an unknown calibration": (
        "adapters.f",
        TUNED | {"tune": {"calibration": "x", "steps": 5}},
        "calibrations has no entry 'x'; known: c",
    ),
    "tuned by nothing": (
        "adapters.f",
        TUNED | {"tune": {"calibration": "c"}},
        "missing; it is need",
    ),
    "data set and mix": ("calibrations.c.mix", {"d": 0.5, "x": 0.5}, "exactly one of dataset and"),
    "no data set": ("calibrations.c.dataset", REMOVE, "dataset and mix (found neither)"),
    "shares of more than all": ("calibrations.c", mixed(d=0.5, e=0.6), "the shares add up to 1.1"),
    "share of an unknown one": ("calibrations.c", mixed(d=0.5, x=0.5), "no entry 'x'; known: d, e"),
    "share of no sample": ("calibrations.c", mixed(d=0.9, e=0.1), "e: gives none of 4 samples"),
    "documents for AutoRound": (
        "calibrations.c.layout",
        "documents",
        "compressing wants full windows; set calibrations.c.layout to packed",
    ),
    "window of an lm_eval task": ("tasks.t.window", 8, "goes with perplexity, not with lm_eval"),
    "limit of a perplexity": ("tasks.p.limit", 8, "goes with lm_eval, not with perplexity; remove"),
    "template of a perplexity": ("tasks.p.chat_template", True, "goes with lm_eval, not with"),
    "two ways to judge": (
        "tasks.t.perplexity",
        "d",
        "exactly one of lm_eval and perplexity (found lm_eval and perplexity)",
    ),
    "no way to judge": ("tasks.t.lm_eval", REMOVE, "lm_eval and perplexity (found none)"),
    # Sources.
    "two sources": (
        "models.m.path",
        ".",
        "exactly one of hub, wheel and path (found hub and path)",
    ),
    "no source": ("models.m", {}, "exactly one of hub, wheel and path (found none)"),
    "no revision": ("models.m.revision", REMOVE, "models.m.revision: missing; a hub source needs"),
    "key of another source": ("models.m.sha256", "0" * 64, "belongs to a wheel source; remove it"),
    "bad digest": ("models.m.sha256", "abc", "SHA-256 of the wheel file, 64 lower-case hex digits"),
    "no such path": ("models.m", {"path": "no/such"}, "no/such does not exist; name an existing"),
    "no such home": ("models.m", {"path": "~nobody-here/m"}, "does not exist; name an existing"),
    # Empty sections and values, as left behind when all that is in them is commented out.
    "empty models": ("models", None, "models: empty; give a section (keys with values below it);"),
    "empty entry": ("tasks.t", None, "tasks.t: empty; give a section (keys with values below it)"),
    "empty runtime": ("runtime", None, "runtime: empty; give a section (keys with values below"),
    "empty covariance": ("covariance", None, "or remove it; the pass that collects"),
    "empty number": ("calibrations.c.seqlen", None, "empty; give a whole number; tokens a sample"),
    "empty list": ("adapters.e.bits", None, "empty; give a list, or remove it; bits of"),
}
# Where the line names another key than the one changed.
NAMED = {
    "key of nothing": "runtime.colour",
    "odd device": "runtime.device",
    "rank 0": "adapters.e.ranks.0",
    "rank above max_rank": "adapters.e.ranks",
    "documents for AutoRound": "compressions.w2.calibration",
    "iters of GPTQ": "compressions.w2.iters",
    "nothing is left": "compressions.w2.sparsity",
    "no checkpoint": "compressions.w2.checkpoint",
    "checkpoint of an unknown model": "compressions.w2.model",
    "checkpoint from nowhere": "compressions.w2.checkpoint",
    "bits of a checkpoint": "compressions.w2.bits",
    "calibration of a checkpoint": "compressions.w2.calibration",
    "data set and mix": "calibrations.c",
    "no data set": "calibrations.c",
    "shares of more than all": "calibrations.c.mix",
    "share of an unknown one": "calibrations.c.mix.x",
    "share of no sample": "calibrations.c.mix.e",
    "around an unknown compression": "compressions.again.around.compression",
    "around an unknown adapter": "compressions.again.around.adapter",
    "around a rank above max_rank": "compressions.again.around.rank",
    "around itself": "compressions.w2.around.compression",
    "scales of itself": "compressions.w2.compression",
    "scales of a ring": "compressions.w2.compression",
    "scales of nothing": "compressions.w2.compression",
    "scales of an unknown compression": "compressions.again.compression",
    "scales of what was pruned": "compressions.again.compression",
    "scales beside no rank": "compressions.again.rank",
    "bits of new scales": "compressions.again.bits",
    "around a checkpoint": "compressions.again.around.compression",
    "around an adapter of rescaled layers": "compressions.again.around.compression",
    "gptq around an adapter": "compressions.again.around",
    "tuned in few bits": "adapters.f.tune",
    "tuned on an unknown calibration": "adapters.f.tune.calibration",
    "tuned by nothing": "adapters.f.tune.steps",
    "two ways to judge": "tasks.t",
    "no way to judge": "tasks.t",
    "two sources": "models.m",
    "no such path": "models.m.path",
    "no such home": "models.m.path",
}
MORE = {"bad digest", "scales of a ring"}  # what else is wrong with these has a case of its own


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_with_its_key_and_mend(case):
    at, value, mend = MISTAKES[case]
    lines = complaints(changed((at, value)))
    assert len(lines) == 1 or case in MORE, lines
    assert lines[0].startswith(f"{NAMED.get(case, at)}: ")
    assert mend in lines[0]


@pytest.mark.parametrize("again", [AGAIN, RESCALED], ids=["around", "rescale"])
def test_what_layers_read_where_an_adapter_is_missing_is_nothing_to_fit_to(again):
    of_all = ("compressions.again", again), ("adapters.e.calibrate_on", "compressed")
    (told,) = complaints(changed(*of_all))
    assert told.startswith("adapters.e.calibrate_on: again is of no use without an adapter")
    beside = {"calibration": "c", "ranks": [4], "compressions": ["again"]}
    config = changed(*of_all, ("adapters.e.compressions", ["w2"]), ("adapters.f", beside))
    assert cfg.validate(config, SCHEMA)["adapters"]["e"]["calibrate_on"] == "compressed"


# --- every constraint of the schema ---

WRONG = {
    "string": 3,
    "integer": "x",
    "number": "x",
    "boolean": "x",
    "array": {},
    "object": [],
    "['integer', 'string']": [],
}
# What fits no pattern is written here, by the pattern.
UNFIT = {
    SCHEMA["$defs"]["name"]["pattern"]: "a/b",
    "^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$": "a/b/c",
    "^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$": "package>=1",
    "^[0-9a-f]{64}$": "F" * 64,
    "^all$": "half",
    "^(auto|cpu|cuda(:[0-9]+)?)$": "gpu",
    r"^([1-9]:(2|4|8|16)|0\.[0-9]*[1-9][0-9]*)$": "0.0",
}
# A constraint -> a value that breaks it.
BREAK = {
    "type": lambda entry: WRONG.get(str(entry["type"]), 3),
    "enum": lambda entry: "none of them",
    "pattern": lambda entry: UNFIT[entry["pattern"]],
    "minLength": lambda entry: "",
    "minimum": lambda entry: entry["minimum"] - 1,
    "maximum": lambda entry: entry["maximum"] + 1,
    "exclusiveMinimum": lambda entry: entry["exclusiveMinimum"],
    "minItems": lambda entry: [4] * (entry["minItems"] - 1),
    "maxItems": lambda entry: [4] * (entry["maxItems"] + 1),
    "uniqueItems": lambda entry: [4, 4],
    "minProperties": lambda entry: {},
}
SAYS = {  # what the line says before the key's meaning
    "type": "is not ",
    "enum": "is none of ",
    "pattern": "does not fit",
    "minLength": "should be non-empty",
    "minimum": "is less than the minimum of",
    "maximum": "is greater than the maximum of",
    "exclusiveMinimum": "is less than or equal to the minimum of",
    "minItems": "",  # "should be non-empty" or "is too short"
    "maxItems": "is too long",
    "uniqueItems": "has non-unique elements",
    "minProperties": "should be non-empty",
    "required": "missing; it is needed: ",
    "additionalProperties": "unknown key; ",
    "propertyNames": "is no usable name; names become file names",
}
# Keywords that ask nothing by themselves.
MEANING = {"$schema", "$defs", "title", "description", "default", "properties", "items"}


def constraints(entry=SCHEMA, at=()):
    """(path, keyword, value that breaks it, path that the message names) of all in the schema."""
    for keyword, value in entry.items():
        if keyword in MEANING:
            continue
        if keyword == "required":
            yield from (((*at, key), keyword, REMOVE, (*at, key)) for key in value)
        elif keyword == "propertyNames":
            bad = (*at, UNFIT[SCHEMA["$defs"]["name"]["pattern"]])
            yield bad, keyword, {}, bad
        elif keyword == "additionalProperties" and isinstance(value, dict):
            yield from constraints(value, (*at, next(iter(changed()[at[0]]))))
        elif keyword == "additionalProperties":
            yield (*at, "colour"), keyword, 1, (*at, "colour")
        else:  # a keyword or a pattern that is new wants a line above
            yield at, keyword, BREAK[keyword](entry), at
    for key, below in entry.get("properties", {}).items():
        yield from constraints(below, (*at, key))
    if "items" in entry:
        for _, keyword, bad, _ in constraints(entry["items"]):
            yield at, keyword, [bad] * entry.get("minItems", 1), (*at, "0")


CONSTRAINTS = [c for c in constraints() if c[0]]  # an empty path is the file itself: see below


@pytest.mark.parametrize(
    ("at", "keyword", "bad", "named"),
    CONSTRAINTS,
    ids=[f"{'.'.join(at)}:{keyword}" for at, keyword, *_ in CONSTRAINTS],
)
def test_every_constraint_of_the_schema_is_explained(at, keyword, bad, named):
    config = changed()
    section = config
    for key in at[:-1]:
        section = section.setdefault(key, {})
    put(config, at, bad)
    fired = {error.validator for error in cfg.Draft202012Validator(SCHEMA).iter_errors(config)}
    broken = {"pattern"} if keyword == "propertyNames" else {keyword}
    assert broken <= fired, fired
    lines = [line for line in complaints(config) if line.startswith(f"{'.'.join(named)}: ")]
    assert any(SAYS[keyword] in line for line in lines), lines


def test_the_file_itself_has_constraints_of_its_own():
    kinds = {keyword for at, keyword, *_ in constraints() if not at}
    assert kinds <= {"type"}  # see test_an_empty_file_is_explained


@pytest.mark.parametrize("section", ["models", "datasets", "calibrations", "compressions", "tasks"])
@pytest.mark.parametrize(
    "name", ["a/b", "a b", ".hidden", "-x", "a+b", "ä", "", "x" * 65], ids=lambda n: n[:5] or "none"
)
def test_a_name_that_is_no_file_name_is_refused(section, name):
    entry = next(iter(changed()[section].values()))
    (line,) = complaints(changed(((section, name), entry)))
    assert line.startswith(f"{section}.{name}: ")
    assert "is no usable name; names become file names: take letters, digits" in line


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-1", "Qwen2.5-72B", "x" * 64])
def test_a_name_that_is_a_file_name_is_taken(name):
    cfg.validate(changed((("tasks", name), {"lm_eval": "arc_easy"})), SCHEMA)


def test_no_compression_is_called_original():
    (line,) = complaints(changed(("compressions.original", {"bits": 3, "calibration": "c"})))
    assert line == (
        "compressions.original: the name is taken by the uncompressed model; choose another"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [("1", "1"), ("on", "true"), ("~", "null"), ("2025-01-02", "2025-01-02"), ("1.5", "1.5")],
)
@pytest.mark.parametrize("place", ["", "models", "tasks", "tasks.t"])
def test_a_key_that_yaml_reads_as_no_text_wants_quotes(text, shown, place):
    config = changed()
    inner = config
    for part in place.split(".") if place else ():
        inner = inner[part]
    inner |= yaml.safe_load(f"{text}: {{hub: owner/x, revision: main, lm_eval: x}}")
    where = f"{place}.{shown}" if place else shown
    mend = f"{where}: YAML reads this key as {shown}, not as text; put it in quotes"
    assert mend in complaints(config)


@pytest.mark.parametrize("config", [{}, None, [], "text"], ids=str)
def test_an_empty_file_is_explained(config):
    text = "\n".join(complaints(config))
    if config == {}:
        assert text.startswith("models: missing; it is needed: ")
        assert "\ntasks: missing; it is needed: " in text
    else:
        assert text.startswith("the config: ")
        assert "a section (keys with values below it)" in text


def test_all_mistakes_are_listed_at_once():
    lines = complaints(
        changed(
            ("taks", {}),
            ("models.m.revision", REMOVE),
            ("calibrations.c.dataset", "x"),
            ("compressions.w2.bits", 5),
            ("adapters.e.ranks", [4, 600, 700]),
            ("adapters.e.calibration", "moments"),
            ("tasks.t.limit", 0),
        )
    )
    assert [line.split(":")[0] for line in sorted(lines)] == [
        "adapters.e.calibration",
        "adapters.e.ranks",
        "adapters.e.ranks",
        "calibrations.c.dataset",
        "compressions.w2.bits",
        "models.m.revision",
        "taks",
        "tasks.t.limit",
    ]


def test_mistakes_in_shape_are_listed_at_once():
    lines = complaints(changed(("models", None), ("tasks.t", []), ("adapters.e.ranks", 4)))
    assert sorted(line.split(":")[0] for line in lines) == ["adapters.e.ranks", "models", "tasks.t"]


def test_a_long_value_is_cut():
    (line,) = complaints(changed(("adapters.e.ranks", "4 " * 1000)))
    assert len(line) < 400


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 600)
    | st.floats()
    | st.dates()
    | st.text(max_size=5)
    | st.sampled_from(["c", "d", "m", "original", "eora"])
)
keys = st.sampled_from(["path", "hub", "bits", "c", "perplexity"]) | scalars
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


def places(value, at=()):
    yield at
    for key, below in value.items() if isinstance(value, dict) else ():
        yield from places(below, (*at, key))


@settings(deadline=None)
@given(st.sampled_from(list(places(yaml.safe_load(BASE)))[1:]), keys, values, st.booleans())
def test_nothing_but_a_config_error_comes_of_odd_values(at, key, value, beside):
    config = changed(((*at[:-1], key) if beside else at, value))
    try:
        filled = cfg.validate(config, SCHEMA)
    except cfg.ConfigError:
        return
    cfg.variants(filled)


# --- ranks that a model's layers cannot have ---

MANIFEST = {
    "tensors": {
        "model.safetensors": {
            "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 64]},
            "model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [96, 64]},
            "model.layers.0.self_attn.k_proj.weight": {"dtype": "F32", "shape": [32, 64]},
            "model.layers.0.self_attn.k_proj.bias": {"dtype": "F32", "shape": [32]},
            "model.layers.0.input_layernorm.weight": {"dtype": "F32", "shape": [64]},
            "model.layers.1.mlp.gate.weight": {"dtype": "F32", "shape": [8, 64]},
            "model.layers.1.mlp.shared_expert_gate.weight": {"dtype": "F32", "shape": [1, 64]},
            "model.layers.1.mlp.experts.0.gate_proj.weight": {"dtype": "F32", "shape": [48, 64]},
        }
    }
}


def test_a_rank_up_to_the_widest_layer_is_taken():
    cfg.check_ranks(MANIFEST, "m", {"adapters.e.ranks": [1, 33], "adapters.f.ranks": [64]})


def test_a_rank_above_all_layers_widths_is_refused():
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.check_ranks(MANIFEST, "m", {"adapters.e.ranks": [16, 65], "adapters.f.ranks": [128]})
    layer = "all layers of model m, such as model.layers.0.mlp.up_proj.weight (64)"
    assert str(caught.value).split("\n") == [
        f"- adapters.e.ranks: 65 is above the width of {layer}; lower the rank to at most 64",
        f"- adapters.f.ranks: 128 is above the width of {layer}; lower the rank to at most 64",
    ]


def test_a_model_without_decoder_layers_takes_any_rank():
    cfg.check_ranks({"tensors": {}}, "m", {"adapters.e.ranks": [1000]})


# --- defaults ---


def defaults(schema=SCHEMA, at=()):
    """(path, default) of every option; the path has an entry of BASE where names are free."""
    for key, entry in schema.get("properties", {}).items():
        if "default" in entry:
            yield (*at, key), entry["default"]
        if "required" not in entry:  # else there is more to it than this default
            yield from defaults(entry, (*at, key))
    if isinstance(schema.get("additionalProperties"), dict):
        for name in changed()[at[0]]:
            yield from defaults(schema["additionalProperties"], (*at, name))


@pytest.mark.parametrize(("at", "default"), list(defaults()), ids=lambda x: str(x)[:40])
def test_writing_out_a_default_changes_nothing(at, default):
    config = changed()
    for depth in range(1, len(at)):
        if at[depth - 1] in ("covariance", "runtime"):
            config.setdefault(at[depth - 1], {})
    if at[-1] not in config:  # sections of BASE stay
        put(config, at, copy.deepcopy(default))
    assert cfg.validate(config, SCHEMA) == cfg.validate(changed(), SCHEMA)


def test_defaults_are_filled_in_at_every_level():
    filled = cfg.validate(changed(), SCHEMA)
    assert filled["results"] == "results"
    assert filled["models"]["m"] == {
        "hub": "owner/m",
        "revision": "main",
        "dtype": "bfloat16",
        "trust_remote_code": False,
    }
    assert filled["calibrations"]["c"]["layout"] == "packed"
    assert filled["compressions"]["w2"] == {
        "method": "autoround",
        "sparsity": "2:4",
        "bits": 2,
        "calibration": "c",
        "group_size": 128,
        "sym": False,
        "iters": 200,
        "batch_size": 8,
        "format": "auto_round",
        "alg_ext": False,
        "keep": [],
        "seed": 42,
        "rounds": 2,
    }
    assert filled["adapters"]["e"] == {
        "calibration": "c",
        "ranks": [4, 8],
        "max_rank": 512,
        "bits": [4],
        "group_size": 32,
        "method": "eora",
        "calibrate_on": "original",
    }
    assert filled["tasks"]["p"]["window"] == 2048
    assert filled["covariance"] == {"shards": 1, "expert_tokens": 512, "tf32": False}
    assert filled["runtime"] == {"device": "auto", "batch_size": 8, "threads": 0, "store": True}


def test_sections_may_be_left_out():
    filled = cfg.validate(
        {"models": {"m": {"hub": "m", "revision": "1"}}, "tasks": {"t": {"lm_eval": "x"}}}, SCHEMA
    )
    for section in ("datasets", "calibrations", "compressions", "adapters"):
        assert filled[section] == {}


def test_validating_again_changes_nothing():
    once = cfg.validate(changed(), SCHEMA)
    assert cfg.validate(once, SCHEMA) == once


def test_16_and_16_0_are_one_value():
    config = changed(("calibrations.c.samples", 16.0), ("adapters.e.ranks", [4.0]))
    filled = cfg.validate(config, SCHEMA)
    for value in (filled["calibrations"]["c"]["samples"], filled["adapters"]["e"]["ranks"][0]):
        assert isinstance(value, int)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_config_and_the_schema_are_left_as_they_were(wrong):
    config, schema = changed(), copy.deepcopy(SCHEMA)
    if wrong:
        config["taks"] = {}
    before = copy.deepcopy(config)
    try:
        filled = cfg.validate(config, schema)
        filled["compressions"]["w2"]["keep"].append("x")
        filled["adapters"]["e"]["ranks"].append(1)
        filled["datasets"].clear()
    except cfg.ConfigError:
        assert wrong
    assert (config, schema) == (before, SCHEMA)


def test_samples_of_a_mix_follow_its_shares():
    entry = {"samples": 10, "mix": {"a": 0.5, "b": 0.25, "c": 0.25}}
    assert cfg.shares(entry) == {"a": 5, "b": 3, "c": 2}  # the first of equal rests goes up
    assert cfg.shares(entry | {"mix": {"c": 0.25, "b": 0.25, "a": 0.5}}) == cfg.shares(entry)
    assert cfg.shares({"samples": 3, "mix": {"a": 0.1, "b": 0.9}}) == {"a": 0, "b": 3}
    assert cfg.shares({"samples": 7, "dataset": "a"}) == {"a": 7}


def test_a_mixture_is_tracked_by_its_names():
    """Not by their order; and shares that change places are another mixture."""

    def tracked(mix):
        entry = {"mix": mix, "samples": 16, "seqlen": 8}
        config = cfg.validate(changed(("calibrations.c", entry)), SCHEMA)
        return stages.params(config, "tokenize", {"model": "m", "calibration": "c"})

    assert tracked({"d": 0.25, "e": 0.75}) == tracked({"e": 0.75, "d": 0.25})
    assert tracked({"d": 0.25, "e": 0.75}) != tracked({"e": 0.25, "d": 0.75})


def test_an_existing_checkpoint_is_of_one_model_alone():
    config = changed(
        ("models.n", {"hub": "owner/n", "revision": "main"}), ("compressions.q", EXISTING)
    )
    found = {(v.model, v.name) for v in cfg.variants(cfg.validate(config, SCHEMA))}
    assert {("m", "q"), ("m", "q+e-r4-4bit"), ("n", "w2")} <= found
    assert not [name for model, name in found if model == "n" and name.startswith("q")]


def test_variants_are_the_product_of_what_is_named():
    names = [v.name for v in cfg.variants(cfg.validate(changed(), SCHEMA))]
    assert names == ["original", "w2", "w2+e-r4-4bit", "w2+e-r8-4bit"]


# --- the schema, and the config that explains it ---


def options(schema=SCHEMA, at=()):
    """(path, schema, schema around it) of every key that the config may hold."""
    for key, entry in schema.get("properties", {}).items():
        yield (*at, key), entry, schema
        yield from options(entry, (*at, key))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from options(schema["additionalProperties"], at)


OPTIONS = {".".join(at): (at, entry, around) for at, entry, around in options()}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_described(name):
    assert OPTIONS[name][1].get("description")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_says_what_holds_without_it(name):
    at, entry, around = OPTIONS[name]
    if at[-1] in around.get("required", ()) or "default" in entry:
        return
    one_of = re.search(r"exactly one of (.+)", around["description"])
    if one_of and at[-1] in re.split(r", | and ", one_of[1]):
        return
    assert "without it" in entry["description"] or "source needs it" in entry["description"]


@pytest.mark.parametrize("name", [n for n in OPTIONS if "default" in OPTIONS[n][1]])
def test_a_default_fits_its_own_schema(name):
    validator = cfg.Draft202012Validator(OPTIONS[name][1] | {"$defs": SCHEMA["$defs"]})
    assert not list(validator.iter_errors(OPTIONS[name][1]["default"]))


def shipped_sections():
    """Section -> its text in config.yaml, with the comment above it."""
    blocks = SHIPPED.read_text().split("\n\n")
    heads = ((re.findall(r"^(?:# )?([a-z]+):", block, flags=re.M), block) for block in blocks)
    found = {head[-1]: block for head, block in heads if head}
    found["datasets"] += found["models"]  # "Sources as for models"
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_config_yaml_mentions_every_option(name):
    section, *rest = OPTIONS[name][0]
    text = shipped_sections()[section]
    assert not rest or re.search(rf"\b{rest[-1]}\b", text)


@pytest.mark.parametrize("file", [SHIPPED, *EXAMPLES], ids=lambda f: f.stem)
def test_shipped_configs_are_valid_and_name_commits(file):
    config = cfg.validate(yaml.safe_load(file.read_text()), SCHEMA)
    for entry in (*config["models"].values(), *config["datasets"].values()):
        assert "hub" not in entry or re.fullmatch(r"[0-9a-f]{40}", entry["revision"])


# --- Snakemake with it ---


def dry_run(config, folder):
    """`snakemake -n` as a user calls it, for results in another folder."""
    command = [sys.executable, "-m", "snakemake", "-n", "-d", str(folder)]
    return subprocess.run(
        [*command, "--configfile", str(config)],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


# Jobs that a config asks for from nothing. Counted by hand: a model and each data set once, a
# second moment pass in shards, each compression decomposed in shards for each adapter, each rank
# sliced once and rounded for each bits below 16, each variant judged by each task.
JOBS = {
    "config": {
        "download_model": 1,
        "download_dataset": 3,
        "prepare_task": 1,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 1,
        "decompose": 2,
        "adapter": 2 * 2,
        "quantize_adapter": 2 * 2,
        "evaluate": (1 + 2 + 2 * 2) * 2,
    },
    "llama3-8b-paper": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 3,
        "check_model": 1,
        "tokenize": 2,
        "compress": 5,
        "covariance": 4,
        "decompose": 5 * 3 * 4,
        "adapter": 5 * 3,
        "quantize_adapter": 5,
        "evaluate": (1 + 5 + 5 * 4) * 4,
    },
    "llama3-8b-ranks": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 3,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 4,
        "decompose": 2 * 4,
        "adapter": 2 * 4,
        "quantize_adapter": 2 * 4 * 2,
        "evaluate": (1 + 2 + 2 * 4 * 3) * 4,
    },
    "llama3.2-3b-mmlu": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 1,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 4,
        "decompose": 2 * 2 * 4,
        "adapter": 2 * 3,
        "quantize_adapter": 2 * 2,
        "evaluate": (1 + 2 + 2 * (2 * 2 + 1)) * 2,
    },
    "qwen2.5-72b-2bit": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 1,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 16,
        "decompose": 2 * 16,
        "adapter": 2 * 3,
        "quantize_adapter": 2 * 3,
        "evaluate": (1 + 2 + 2 * 3 * 2) * 2,
    },
    "qwen3-14b-2bit": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 1,
        "check_model": 1,
        "tokenize": 2,
        "compress": 3,
        "covariance": 8,
        "decompose": 3 * 8,
        "adapter": 3 * 3,
        "quantize_adapter": 3 * 3,
        "evaluate": (1 + 3 + 3 * 3 * 2) * 2,
    },
    "smollm2-paper": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 1,
        "compress": 4,
        "covariance": 1,
        "decompose": 4 * 3,
        "adapter": 4 * 3,
        "evaluate": 1 + 4 * (1 + 3),
    },
    "smollm2-tuned": {
        "download_model": 1,
        "download_dataset": 3,
        "check_model": 1,
        "tokenize": 3,
        "compress": 1,
        "covariance": 1,
        "decompose": 5,
        "adapter": 5,
        "tune_adapter": 3,
        "evaluate": 1 + 1 + 5,
    },
    "smollm2-rescaled": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 2,
        "compress": 3,
        "covariance": 1,
        "decompose": 3,
        "adapter": 3 * 2,
        "quantize_adapter": 3 * 2,
        "evaluate": 1 + 1 + 3 * 2 * 2,  # beside an adapter they are not judged without one
    },
    "smollm2-rounding": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 2,
        "compress": 6,
        "covariance": 1,
        "decompose": 6,
        "adapter": 6,
        "quantize_adapter": 6,
        "evaluate": 1 + 3 + 6,
    },
    "smollm2-around": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 2,
        "compress": 3,
        "covariance": 1,
        "decompose": 3,
        "adapter": 3 * 2,
        "quantize_adapter": 3 * 2,
        "evaluate": 1 + 2 + 3 * 2 * 2,  # what is made around an adapter is not judged without
    },
    "smollm2-frontier": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 2,
        "compress": 8,
        "covariance": 1,
        "decompose": 4 + 1 + 3,  # one for the adapter that w2-around is rounded around
        "adapter": 4 * 2 + 1 + 3,
        "quantize_adapter": 4 * 2 + 1 + 3,
        "evaluate": 1 + 5 + 4 * 2 + 3,
    },
    "smollm2-inputs": {
        "download_model": 1,
        "download_dataset": 2,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 1,
        "compressed_covariance": 2,
        "decompose": 2 * 2,
        "adapter": 2 * (3 + 2),
        "quantize_adapter": 2 * 3,
        "evaluate": 1 + 2 + 2 * (3 * 2 + 2),
    },
    "qwen3-32b-2bit": {
        "download_model": 1,
        "download_dataset": 2,
        "prepare_task": 1,
        "check_model": 1,
        "tokenize": 2,
        "compress": 2,
        "covariance": 8,
        "decompose": 2 * 8,
        "adapter": 2 * 3,
        "quantize_adapter": 2 * 3,
        "evaluate": (1 + 2 + 2 * 3 * 2) * 2,
    },
}


@pytest.mark.parametrize("file", [SHIPPED, *EXAMPLES], ids=lambda f: f.stem)
def test_shipped_configs_ask_for_the_right_jobs(file, tmp_path):
    done = dry_run(file, tmp_path)
    assert done.returncode == 0, done.stderr
    stats = (done.stdout + done.stderr).split("Job stats:")[-1]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", stats, flags=re.M)}
    jobs.pop("total")
    assert jobs == JOBS[file.stem] | {"report": 1, "all": 1}


@pytest.mark.parametrize(
    ("text", "mends"),
    [
        pytest.param(
            BASE.replace("ranks: [4, 8]", "rank: [4]").replace("bits: 2", "bits: 5")
            + "runtime:\n  # device: cpu\n",
            [
                "- adapters.e.rank: unknown key; did you mean ranks?",
                "- adapters.e.ranks: missing; it is needed: ranks to make",
                "- compressions.w2.bits: 5 is none of 2, 3, 4, 8; bits a weight",
                "- runtime: empty; give a section (keys with values below it), or remove it",
            ],
            id="schema",
        ),
        pytest.param(
            BASE.replace("perplexity: d", "perplexity: wikitext"),
            ["- tasks.p.perplexity: datasets has no entry 'wikitext'; known: d, e"],
            id="reference",
        ),
        pytest.param(
            BASE.replace("  t:", "  on:"),
            ["- tasks.true: YAML reads this key as true, not as text; put it in quotes"],
            id="key",
        ),
    ],
)
def test_snakemake_shows_the_mend_alone_and_starts_nothing(text, mends, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    done = dry_run(file, tmp_path)
    assert done.returncode == 1
    shown = (done.stdout + done.stderr).strip().split("\n")
    assert shown.pop(0).startswith("Using workflow specific profile")
    assert shown[0] == f"{file} does not fit. Please mend:"
    assert len(shown) == 1 + len(mends)
    for mend in mends:
        assert any(line.startswith(mend) for line in shown)
    assert not (tmp_path / "results").exists()


def test_snakemake_checks_ranks_against_models_that_are_there(tmp_path):
    made = tmp_path / "results" / "models" / "m" / "manifest.json"
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps(MANIFEST))
    file = tmp_path / "mine.yaml"
    file.write_text(BASE.replace("ranks: [4, 8]", "ranks: [4, 65]"))
    done = dry_run(file, tmp_path)
    assert done.returncode == 1
    assert "adapters.e.ranks: 65 is above the width of all layers of model m" in done.stderr
    assert "Traceback" not in done.stderr


# --- compressions around adapters ---


def test_a_compression_is_not_made_around_a_tuned_adapter():
    assert complaints(changed(("compressions.again", AGAIN), ("adapters.e", TUNED))) == [
        "compressions.again.around.adapter: e is fine-tuned; name one without tune"
    ]


def test_a_compression_around_an_adapter_is_judged_with_adapters_alone():
    """The adapter that it is made around is made too, in bits and at a rank that nobody asked for;
    what it is compared with is the compression that the first round began with."""
    twice = AGAIN | {"around": AROUND | {"compression": "again", "bits": 3}}
    config = cfg.validate(
        changed(
            ("compressions.again", AGAIN), ("compressions.twice", twice), ("adapters.e.ranks", [8])
        ),
        SCHEMA,
    )
    assert [v.name for v in cfg.variants(config)] == [
        "original",
        *("w2", "w2+e-r8-4bit", "again+e-r8-4bit", "twice+e-r8-4bit"),
    ]
    asked = [place.folder for place in stages.asked(config)]
    order = [
        *("compressed/m/w2", "adapters/m/w2/e/r4-4bit", "compressed/m/again"),
        *("adapters/m/again/e/r4-3bit", "compressed/m/twice", "adapters/m/twice/e/r8-4bit"),
    ]
    assert [folder for folder in asked if folder in order] == order
    names = {"model": "m", "compression": "twice"}
    before = stages.params(config, "compress", names)
    for key, other in {"compression": "w2", "adapter": "f", "rank": 5, "bits": 8}.items():
        entry = config["compressions"]["twice"]
        entry = entry | {"around": entry["around"] | {key: other}}
        edited = config | {"compressions": config["compressions"] | {"twice": entry}}
        assert stages.params(edited, "compress", names) != before, key
    assert cfg.asked_ranks(config, "m") == {
        "adapters.e.ranks": [8],
        "compressions.again.around.rank": [4],
        "compressions.twice.around.rank": [4],
    }
    assert [cfg.bare(config["compressions"], name) for name in ("w2", "again", "twice")] == [
        "w2"
    ] * 3


# --- scales fitted anew ---


def test_new_scales_come_after_the_compression_and_the_moments():
    """They are judged with adapters alone, and what these win back is counted from the compression
    that they began with."""
    config = cfg.validate(
        changed(
            ("compressions.once", RESCALED),
            ("compressions.twice", RESCALED | {"compression": "once", "rank": 8, "rounds": 3}),
            ("adapters.e.ranks", [8]),
        ),
        SCHEMA,
    )
    assert [v.name for v in cfg.variants(config)] == [
        *("original", "w2", "w2+e-r8-4bit", "once+e-r8-4bit", "twice+e-r8-4bit")
    ]
    asked = [place.folder for place in stages.asked(config)]
    order = ["covariance/m/c/0-of-1", "compressed/m/once", "compressed/m/twice"]
    assert [folder for folder in asked if folder in order] == order
    assert asked.index("compressed/m/w2") < asked.index("compressed/m/once")
    made = config["compressions"]
    assert [cfg.bare(made, name) for name in made] == ["w2"] * 3
    assert [cfg.integers(made, name)["bits"] for name in made] == [2, 2, 2]
    told = stages.report_params(config)["compressions"]["twice"]
    assert told["bits"] == 2 and told["group_size"] == 128 and told["rank"] == 8
    assert cfg.asked_ranks(config, "m") == {
        "adapters.e.ranks": [8],
        "compressions.once.rank": [4],
        "compressions.twice.rank": [8],
    }


def test_new_scales_of_a_checkpoint_belong_to_its_model():
    config = cfg.validate(
        changed(
            ("models.other", {"hub": "owner/other", "revision": "main"}),
            ("compressions.w4", EXISTING),
            ("compressions.s", RESCALED | {"compression": "w4"}),
        ),
        SCHEMA,
    )
    models = {v.model for v in cfg.variants(config) if v.compression == "s"}
    assert models == {"m"}
    around = AGAIN | {"around": AROUND | {"compression": "s"}}
    config["compressions"]["again"] = around
    assert "s is an existing checkpoint, which belongs to one model" in complaints(config)[0]


# --- adapters of some compressions ---


def test_an_adapter_is_fitted_to_the_compressions_that_it_names():
    """And its ranks, and what it wants of a model, matter where one of them is made."""
    config = cfg.validate(
        changed(
            ("models.other", {"hub": "owner/other", "revision": "main"}),
            ("compressions.w4", EXISTING),
            ("adapters.e.ranks", [8]),
            ("adapters.f", {"calibration": "c", "ranks": [4], "compressions": ["w4"]}),
        ),
        SCHEMA,
    )
    assert [(v.model, v.name) for v in cfg.variants(config) if v.adapter == "f"] == [
        ("m", "w4+f-r4-4bit")
    ]
    assert cfg.asked_ranks(config, "other") == {"adapters.e.ranks": [8]}
    assert cfg.asked_ranks(config, "m") == {"adapters.e.ranks": [8], "adapters.f.ranks": [4]}
    config["adapters"]["f"] |= {"tune": {"calibration": "c", "steps": 1}}
    assert cfg.plain_alone(config, "m") == ["adapters.f.tune"]
    assert cfg.plain_alone(config, "other") == []


def test_what_needs_an_adapter_has_one():
    (line,) = complaints(changed(("compressions.s", RESCALED), ("adapters.e.compressions", ["w2"])))
    assert line.startswith("compressions.s: no adapter is fitted to it, and it is of no use")
    (line,) = complaints(changed(("adapters.e.compressions", ["w2", "w5"])))
    assert line.startswith("adapters.e.compressions: compressions has no entry 'w5'")


def test_what_chooses_a_compressions_layers():
    config = cfg.validate(
        changed(
            ("compressions.w4", EXISTING),
            ("compressions.g", {"method": "gptq", "bits": 3, "keep": ["q"], "calibration": "c"}),
            ("compressions.p", {"method": "wanda", "sparsity": "2:4", "calibration": "c"}),
        ),
        SCHEMA,
    )
    assert cfg.choices(config, "m") == {
        "w2": {"group_size": 128, "keep": []},
        "g": {"group_size": 128, "keep": ["q"]},
        "p": {"group_size": -1, "keep": []},  # it is not rounded
    }
