"""Bad config files, models, data and machines: one message with key or file and mend, no result.

The scripts run as they are, with their own command lines, in this process: what they import is
imported once. Mistakes that the schema finds are in test_config.py.
"""

import contextlib
import json
import logging
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file

from conftest import ROOT, SENTENCES, make_tokenizer
from eora import config as cfg
from eora import covariance, manifest, sources
from eora.errors import Mistake

SCHEMA = cfg.load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")

# --- config files ---

GOOD = """\
models:
  m: {hub: owner/m, revision: main}
tasks:
  t: {lm_eval: arc_easy}
"""
MODEL = "{hub: owner/m, revision: main}"
CALIBRATED = (
    GOOD
    + """\
datasets: {d: {hub: owner/d, revision: main}}
calibrations: {c: {dataset: d, samples: 4, seqlen: 8}}
"""
)
# Case -> the file's text, and what the message says.
YAML = {
    "tab": ("models:\n\tm: 1\n", "line 2: found character '\\t'", "indent with spaces"),
    "tab after a key": ("models:\n  m:\t{\n\thub: x}\n", "line 2", "indent with spaces"),
    "key twice": (
        GOOD + "  t: {perplexity: d}\n",
        "key t is written twice, first in line 4",
        "keep",
    ),
    "section twice": (GOOD + "models: {}\n", "line 5: the key models is written twice", "keep one"),
    "key twice in a line": ("tasks: {t: {limit: 1, limit: 2}}", "the key limit is written twice"),
    "key twice in JSON": (
        '{"tasks": {},\n\t"tasks": {}}',
        "line 2: the key tasks is written twice",
    ),
    "undefined alias": (GOOD + "runtime: *fast\n", "line 5: found undefined alias 'fast'", "the &"),
    "star as text": ("models:\n  m: {path: *.gguf}\n", "line 2", "text that begins with * or &"),
    "merge of a word": ("models:\n  m: {<<: base}\n", "line 2: expected a mapping", "give << the"),
    "merge of an anchored word": ("a: &x 1\nb: {<<: *x}\n", "line 1", "alias of a section (*name)"),
    "anchor in itself": ("models: &m\n  m: *m\n", "Circular reference", "mend this value"),
    "anchor of another thing": (
        CALIBRATED.replace("{dataset: d,", "&c {dataset: d,") + "adapters: {e: {calibration: *c, "
        "ranks: [4]}}\n",
        "adapters.e.calibration: a section is not text",
    ),
    "bracket left open": ("models: {m: {hub: x}\ntasks: {}\n", "line 2: ", "the brackets"),
    "quote left open": ("results: 'here\nmodels: {}\n", "line 3", "the quotes"),
    "indentation": ("models:\n  m: {}\n k: {}\n", "line 3: ", "mend the indentation"),
    "colon in text": ("results: a: b\n", "line 1: mapping values are not", "text that holds ': '"),
    "two documents": (GOOD + "---\n" + GOOD, "line 5: but found another document", "second ---"),
    "python tag": ("results: !!python/name:os.system\n", "line 1: ", "begins with ! in quotes"),
    "list as key": ("? [a, b]\n: 1\n", "line 1: found unhashable key", "put text that begins"),
    "control character": ("results: \x01\n", "special characters are not allowed"),
    "no such day": ("results: 2025-13-45\n", "month must be in 1..12", "in quotes"),
    "empty file": ("", "null is no section", "write models: and tasks: in it"),
    "comments alone": ("# models:\n", "null is no section", "write models: and tasks: in it"),
    "list at the top": ("- models\n", "[models] is no section"),
    "text at the top": ("models\n", "models is no section"),
    "octal": (CALIBRATED.replace("4", "010"), "YAML reads 010 as 8", "a plain decimal number"),
    "hexadecimal": (CALIBRATED.replace("4", "0x10"), "YAML reads 0x10 as 16", "a plain decimal"),
    "sexagesimal": (CALIBRATED.replace("4", "1:30"), "YAML reads 1:30 as 90", "a plain decimal"),
    "revision of digits": (
        GOOD.replace("main", "0123456"),
        "line 2: YAML reads 0123456 as 42798",
        "put what is meant as text in quotes",
    ),
    "revision of other digits": (GOOD.replace("main", "1234567"), "1234567 is not text, put it in"),
    "date": (GOOD.replace("main", "2025-01-02"), "2025-01-02 is not text, put it in quotes"),
    "Norway as a value": (
        GOOD.replace("main", "no"),
        "models.m.revision: false is not text (so YAML reads no, off, yes and on), put it in",
    ),
    "Norway as a name": (GOOD.replace(" m:", " no:"), "models.false: YAML reads this key as false"),
    "on as a name": (GOOD.replace(" t:", " on:"), "tasks.true: YAML reads this key as true"),
    "number as a name": (GOOD.replace(" t:", " 1:"), "tasks.1: YAML reads this key as 1"),
    "bits in quotes": (
        CALIBRATED + 'compressions: {w: {bits: "2", calibration: c}}\n',
        "compressions.w.bits: '2' is none of 2, 3, 4, 8, remove the quotes",
    ),
    "samples in quotes": (
        CALIBRATED.replace("4", "'4'"),
        "calibrations.c.samples: '4' is not a whole number, remove the quotes",
    ),
    "truth in quotes": (
        GOOD.replace("arc_easy", "arc_easy, chat_template: 'false'"),
        "tasks.t.chat_template: 'false' is not true or false, remove the quotes",
    ),
    "one rank": (
        CALIBRATED + "adapters: {e: {calibration: c, ranks: 32}}\n",
        "adapters.e.ranks: 32 is not a list, write [32]",
    ),
    "ranks in quotes": (
        CALIBRATED + "adapters: {e: {calibration: c, ranks: '[32, 64]'}}\n",
        "adapters.e.ranks: '[32, 64]' is not a list, remove the quotes",
    ),
    "NaN": (CALIBRATED.replace("4", ".nan"), "calibrations.c.samples: .nan is not a whole number"),
    "infinity": (CALIBRATED.replace("8", ".inf"), "calibrations.c.seqlen: .inf is not a whole"),
    "NaN in JSON": ('{"models": NaN, "tasks": {}}', "models: .nan is not a section"),
    "no revision": (
        GOOD.replace(", revision: main", ""),
        "models.m.revision: missing; a hub source needs it",
    ),
    "no such path": (GOOD.replace(MODEL, "{path: not/here}"), "models.m.path: not/here does not"),
    "space missing": (GOOD.replace("hub: ", "hub:"), "models.m.hub:owner/m: unknown key"),
}


def shown(file):
    """The message for a config file, as the workflow's rules make it."""
    from snakemake.common.configfile import load_configfile

    with pytest.raises(cfg.Mistake) as caught:
        cfg.check_file(file)
        cfg.validate(load_configfile(str(file)), SCHEMA)
    return str(caught.value)


@pytest.mark.parametrize("case", YAML)
def test_a_bad_config_file(case, tmp_path):
    text, *parts = YAML[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = shown(file)
    assert not [part for part in parts if part not in message], message
    assert str(file) in message or message.startswith("- ")


def test_a_config_file_in_another_encoding(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(GOOD.encode("utf-16"))
    assert "save it as UTF-8" in shown(file)


def test_a_config_file_that_is_not_there(tmp_path):
    with pytest.raises(cfg.Mistake, match=r"mine\.yaml: No such file .* name a file"):
        cfg.check_file(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {k: 1}\nb: {<<: *x, k: 2}\nc: {d: {e: &y {<<: *x, k: 3}}}\nf: {<<: *y}\n",
        "a: [10, -3, 1_000, 0, 0.5, '010', 1e3]\n",
        '{\n\t"a": {"k": 1},\n\t"b": {"k": "\\t"}\n}\n',
        "\ufeffa: 1\n",
    ],
)
def test_a_good_config_file_passes(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    cfg.check_file(file)


def snakemake(folder, *args):
    """`snakemake -n`, called in a folder; stdout and stderr together."""
    command = [sys.executable, "-m", "snakemake", "-n", "--snakefile", str(ROOT / "Snakefile")]
    return subprocess.run(
        [*command, *args],
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("case", ["tab", "section twice", "empty file", "NaN in JSON"])
def test_snakemake_shows_a_bad_config_files_message_alone(case, tmp_path):
    text, *parts = YAML[case]
    (tmp_path / "mine.yaml").write_text(text)
    done = snakemake(tmp_path, "--configfile", "mine.yaml")
    assert done.returncode == 1
    assert not [part for part in (*parts, "mine.yaml", "Please mend:") if part not in done.stdout]
    assert "Traceback" not in done.stdout and "WorkflowError" not in done.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name != ".snakemake"] == ["mine.yaml"]


def test_snakemake_looks_at_the_shipped_name_too(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML["tab"][0])
    done = snakemake(tmp_path)
    assert done.returncode == 1 and "config.yaml, line 2: " in done.stdout
    assert "Traceback" not in done.stdout and "WorkflowError" not in done.stdout


def test_what_the_command_line_sets_goes_before_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    done = snakemake(tmp_path, "--configfile", "mine.yaml", "--config", "results=elsewhere")
    assert done.returncode == 0 and "elsewhere/report.html" in done.stdout
    done = snakemake(tmp_path, "--configfile", "mine.yaml", "--config", "result=elsewhere")
    assert done.returncode == 1 and "result: unknown key; did you mean results?" in done.stdout


def test_snakemake_refuses_local_weights_that_are_not_whole(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"\0" * 7)
    (tmp_path / "mine.yaml").write_text(GOOD.replace(MODEL, "{path: weights}"))
    done = snakemake(tmp_path, "--configfile", "mine.yaml")
    assert done.returncode == 1 and "model.safetensors: no whole safetensors file" in done.stdout
    assert "Traceback" not in done.stdout


# --- models, data and machines, through the scripts ---


def run(capfd, script, *args, params=None):
    """Exit code and stderr of a script, run in this process as from the command line."""
    given = [] if params is None else ["--params", json.dumps(params)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, (*given, *args))])
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")  # put back afterwards
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    logging.basicConfig(force=True)
    return done.value.code, capfd.readouterr().err


def refused(capfd, out, script, *args, params=None):
    """The one message with which a script refuses its input; nothing of a result is left."""
    code, shown = run(capfd, script, *args, "--out", out, params=params)
    assert code == 1, shown
    assert len(re.findall(r"^Error: |Traceback", shown, re.MULTILINE)) == 1, shown
    left = [p.name for p in out.iterdir()] if out.is_dir() else []
    assert not set(left) - {"cache", ".lock"}, left
    return shown[shown.index("Error: ") :]


def seal(folder):
    """Make a folder pass for a finished stage's."""
    (folder / manifest.NAME).write_text(json.dumps({"outputs": {}, "tensors": {}}))
    return folder


def save(folder, rows, name="data"):
    """A data set's folder as its download leaves it."""
    columns = rows if isinstance(rows, dict) else {"text": rows}
    Dataset.from_dict(columns).save_to_disk(folder / name)
    return seal(folder)


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model, to be spoilt; its weights are files of its own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "in"))


@pytest.fixture
def stage(tiny_model, tmp_path):
    """The tiny model as its download leaves it."""
    shutil.copytree(tiny_model, tmp_path / "made" / "model")
    return seal(tmp_path / "made")


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def cut(name, end):
    def spoil(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[:end])

    return spoil


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(shard):
    content = json.dumps({"weight_map": {"a": "model.safetensors", "b": shard}})
    return put("model.safetensors.index.json", content)


CODE = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "x.X"}}'
FP8 = '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"
# Case -> what is done to a good model folder, and what the message says.
MODELS = {
    "gone": (shutil.rmtree, "models.<name>.path: ", "does not exist; name an existing one"),
    "no weights": (drop("model.safetensors"), "no *.safetensors", "Name a folder with safetensors"),
    "pickles": (pickles, "pytorch_model.bin is pickled", "convert it once with AutoModelForCausal"),
    "weights cut off": (cut("model.safetensors", -1000), "model.safetensors: no whole", "fetch it"),
    "weights cut in the header": (cut("model.safetensors", 50), "no whole", "fetch it again"),
    "empty weights": (cut("model.safetensors", 0), "header too small", "fetch it again"),
    "pointer for weights": (put("model.safetensors", POINTER), "no whole safet", "fetch it again"),
    "shard missing": (index("model-2.safetensors"), "names model-2.safetensors, which is missing"),
    "index is no JSON": (put("model.safetensors.index.json", "{"), "index.json is not JSON"),
    "no config.json": (drop("config.json"), "config.json is missing; add the one"),
    "config.json cut off": (cut("config.json", 20), "config.json is not JSON", "fetch it again"),
    "config.json is a list": (put("config.json", "[]"), "config.json is no JSON object"),
    "no model_type": (put("config.json", "{}"), "config.json: model_type None", "name another"),
    "unknown model_type": (
        put("config.json", '{"model_type": "x"}'),
        "model_type 'x' is none that",
    ),
    "code not allowed": (
        put("config.json", CODE),
        "set trust_remote_code: true if this one brings",
    ),
    "fewer bits already": (
        put("config.json", FP8),
        "its weights are stored in few bits already (fp8); name the model that it was made from",
    ),
    "no language model": (put("config.json", '{"model_type": "vit"}'), "vit is no causal language"),
    "no tokenizer": (
        drop("tokenizer.json", "tokenizer_config.json"),
        "no tokenizer can be read; put tokenizer.json and",
    ),
    "tokenizer cut off": (
        cut("tokenizer.json", 99),
        "no tokenizer can be read; put tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_folder(case, model, tmp_path, capfd):
    spoil, *parts = MODELS[case]
    spoil(model)
    params = {"source": {}, "version": 1}
    args = ("download_model", "--path", model)
    message = refused(capfd, tmp_path / "out", *args, params=params)
    assert str(model) in message
    assert not [part for part in parts if part not in message], message


def test_code_of_another_repository(model, tmp_path, capfd):
    """transformers would fetch it from the hub, whatever it is that day."""
    elsewhere = json.dumps({"auto_map": {"AutoTokenizer": [None, "them/code--own.Tokenizer"]}})
    put("tokenizer_config.json", elsewhere)(model)
    args = ("download_model", "--path", model)
    params = {"source": {}, "version": 1, "trust_remote_code": True}
    message = refused(capfd, tmp_path / "out", *args, params=params)
    assert "auto_map names them/code--own.Tokenizer, code of another repository" in message


@pytest.mark.parametrize("told", [["them/code--own.Tokenizer", None], None])
def test_code_that_older_tokenizers_name_in_a_list(told, tmp_path):
    put("config.json", '{"model_type": "llama"}')(tmp_path)
    put("tokenizer_config.json", json.dumps({"auto_map": told}))(tmp_path)
    if told is None:
        sources.check_kind(tmp_path, code=True)
        return
    with pytest.raises(Mistake, match="code of another repository"):
        sources.check_kind(tmp_path, code=True)


def test_a_model_that_is_a_file(model, tmp_path, capfd):
    args = ("download_model", "--path", model / "model.safetensors")
    message = refused(capfd, tmp_path / "out", *args, params={"source": {}, "version": 1})
    assert "neither a .gguf file nor a folder with safetensors" in message


def write_gguf(path, architecture="llama", tensor=None):
    """A GGUF file that is right as far as it goes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    if tensor is not None:
        writer.add_tensor("blk.0.attn_k.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUFS = {
    "text": (lambda f: f.write_text("no model"), "no whole GGUF file", "fetch it again"),
    "empty": (lambda f: f.write_bytes(b""), "no whole GGUF file", "fetch it again"),
    "tensors cut off": (
        lambda f: (write_gguf(f), cut(f.name, -200)(f.parent)),
        "no whole GGUF file",
    ),
    "header cut off": (lambda f: (write_gguf(f), cut(f.name, 40)(f.parent)), "no whole GGUF file"),
    "quantized otherwise": (
        lambda f: write_gguf(f, tensor=np.ones((8, 8), np.int8)),
        "blk.0.attn_k.weight is quantized as I8",
        "name a GGUF file of another kind",
    ),
    "another architecture": (
        lambda f: write_gguf(f, "clip"),
        "architecture clip is not supported",
        "name the folder of its safetensors",
    ),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_bad_gguf_file(case, tmp_path, capfd):
    make, *parts = GGUFS[case]
    make(tmp_path / "m.gguf")
    args = ("download_model", "--path", tmp_path / "m.gguf")
    message = refused(capfd, tmp_path / "out", *args, params={"source": {}, "version": 1})
    assert str(tmp_path / "m.gguf") in message
    assert not [part for part in parts if part not in message], message


def test_a_hub_that_cannot_be_reached(tmp_path, capfd):
    source = {"hub": "owner/name", "revision": "main"}
    args = ("download_model",)
    message = refused(capfd, tmp_path / "out", *args, params={"source": source, "version": 1})
    assert "models.<name>.hub, or compressions.<name>.checkpoint.hub: " in message
    assert "owner/name at revision main cannot be fetched; check" in message


def test_a_hub_data_set_that_cannot_be_reached(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fails at once
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = {"hub": "owner/name", "revision": "main", "name": "x"}
    args = ("download_dataset",)
    message = refused(capfd, tmp_path / "out", *args, params={"source": source, "version": 1})
    assert "datasets.<name>.hub: owner/name at revision main cannot be fetched; check" in message


def two_splits(folder):
    data = Dataset.from_dict({"text": SENTENCES[:4]})
    DatasetDict({"train": data, "test": data}).save_to_disk(folder / "d")


LINES = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES[:10])
# Case -> a file's name and what makes it, the source's settings, and what the message says.
DATA = {
    "gone": ("d.jsonl", lambda f: None, {}, "datasets.<name>.path: ", "does not exist; name an"),
    "empty file": (
        "d.jsonl",
        put("d.jsonl", ""),
        {},
        "d.jsonl: empty, or no json file, one",
    ),
    "empty text": ("d.txt", put("d.txt", ""), {}, "d.txt: empty, or no text file, one record"),
    "empty table": ("d.csv", put("d.csv", ""), {}, "d.csv: empty, or no csv file"),
    "rows cut off": (
        "d.jsonl",
        put("d.jsonl", LINES[:-5]),
        {},
        "no json file, one record a row",
    ),
    "no parquet": ("d.parquet", put("d.parquet", LINES), {}, "no parquet file", "mend or replace"),
    "no saved data": ("", put("x.txt", ""), {}, "no folder saved by `datasets`"),
    "no rows": (
        "d",
        lambda f: Dataset.from_dict({"text": []}).save_to_disk(f / "d"),
        {},
        "empty, or no folder saved by `datasets`; mend or replace it",
    ),
    "which split": ("d", two_splits, {}, "datasets.<name>.split: missing; set it to one of train,"),
    "no such split": (
        "d",
        two_splits,
        {"split": "dev"},
        "split: dev; set it to one of train, test",
    ),
    "rows beyond": (
        "d.jsonl",
        put("d.jsonl", LINES),
        {"rows": [5, 11]},
        "of 10 rows; end it at 10",
    ),
    "all rows beyond": (
        "d.jsonl",
        put("d.jsonl", LINES),
        {"rows": [50, 60]},
        "rows: [50, 60] goes",
    ),
    "no such column": (
        "d.jsonl",
        put("d.jsonl", LINES),
        {"distinct": "id"},
        "datasets.<name>.distinct: the data set has no column 'id'; set it to one of text",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_a_bad_data_set(case, tmp_path, capfd):
    name, make, source, *parts = DATA[case]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    args = ("download_dataset", "--path", tmp_path / "in" / name)
    message = refused(capfd, tmp_path / "out", *args, params={"source": source, "version": 1})
    assert not [part for part in parts if part not in message], message


TOKENIZE = {"column": "text", "samples": 50, "seqlen": 16, "layout": "packed", "version": 1}
# Case -> the data set's columns, other settings, and what the message says.
TEXTS = {
    "no such column": (
        {"passage": ["a"], "n": [1]},
        {},
        "no column 'text'; set it to one of passage",
    ),
    "numbers": (
        {"text": [1], "title": ["a"]},
        {},
        "'text' holds int64, not text; columns of text: ti",
    ),
    "lists": ({"text": [["a"]]}, {}, "column 'text' holds nested, not text; columns of text: none"),
    "blank": (
        {"text": ["", " ", None]},
        {},
        "the data set has 0 tokens",
        "lower calibrations.<name>",
    ),
    "too few tokens": ({"text": SENTENCES[:9]}, {}, "samples: 50 of 16 tokens", "lower it to"),
    "too long a window": (
        {"text": SENTENCES[:2]},
        {"seqlen": 4096},
        "lower calibrations.<name>.seq",
    ),
    "too few documents": (
        {"text": SENTENCES[:9]},
        {"layout": "documents"},
        "the data set has 9 documents, which make 9; lower it to 9",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_bad_text(case, stage, tmp_path, capfd):
    columns, other, *parts = TEXTS[case]
    data = save(tmp_path / "data", columns)
    args = ("tokenize_text", "--model", stage, "--dataset", data)
    message = refused(capfd, tmp_path / "out", *args, params=TOKENIZE | other)
    assert not [part for part in parts if part not in message], message


def test_a_tokenizer_without_a_pad_token_does_for_padded_documents(stage, tmp_path, capfd):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(stage / "model")
    data = save(tmp_path / "data", [SENTENCES[0], "The hill."])
    args = ("--model", stage, "--dataset", data, "--out", tmp_path / "tokens")
    params = TOKENIZE | {"samples": 2, "layout": "documents"}
    assert run(capfd, "tokenize_text", *args, params=params)[0] == 0
    args = ("--model", stage, "--tokens", tmp_path / "tokens", "--out", tmp_path / "moments")
    params = {"expert_tokens": 512, "shard": 0, "shards": 1, "version": 1}
    assert run(capfd, "covariance", *args, params=params)[0] == 0


COMPRESS = {"bits": 2, "group_size": 32, "sym": False, "iters": 0, "batch_size": 2, "version": 1}
COMPRESS |= {
    "method": "autoround",
    "keep": [],
    "format": "auto_round",
    "alg_ext": False,
    "seed": 42,
}
LAYERS = {
    "misspelt layer": (
        {"keep": ["dwn_proj"]},
        "'dwn_proj' matches no layer",
        "There are down_proj",
    ),
    "no such layer": ({"keep": ["q_proj", "zzz"]}, "keep: 'zzz' matches no layer", "mlp.down_proj"),
    "block beyond": ({"keep": ["layers.7."]}, "keep: 'layers.7.' matches no layer of the model"),
    "no expression": ({"keep": ["q_proj)"]}, "'q_proj)' is part of no name, and no regular"),
    "group of another width": (
        {"group_size": 64},
        "group_size: 64 does not divide the width of model.layers.0.mlp.down_proj (96)",
        "or add down_proj to keep",
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_compression_that_does_not_fit_the_model(case, stage, tmp_path, capfd):
    other, *parts = LAYERS[case]
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    save_file({"input_ids": torch.ones(2, 8, dtype=torch.int32)}, tokens / "tokens.safetensors")
    args = ("compress", "--model", stage, "--tokens", seal(tokens), "--device", "cpu")
    message = refused(capfd, tmp_path / "out", *args, params=COMPRESS | other)
    assert message.startswith("Error: compressions.<name>.")
    assert not [part for part in parts if part not in message], message
    # And right after the download, naming the entry.
    chosen = {key: (COMPRESS | other)[key] for key in ("group_size", "keep")}
    args = ("--name", "m", "--model", stage, "--ranks", "{}")
    code, told = run(capfd, "check_model", *args, "--compressions", json.dumps({"w2": chosen}))
    assert code == 1 and message.replace("<name>", "w2") in told


QUESTIONS = {"question": ["a?"], "choices": [{"text": ["x", "y"], "label": ["A", "B"]}]}
ANSWERED = QUESTIONS | {"answerKey": ["A"]}
# Case -> the data set's columns, those of the few-shot one, the task, and what the message says.
TASKS = {
    "no question": (
        {"text": ["a"]},
        None,
        "arc_easy",
        "tasks.<name>.dataset: lm-eval's arc_easy cannot use these data",
        "'question' is undefined",
        "they have text",
    ),
    "no answer": (QUESTIONS, None, "arc_easy", "'answerKey' is undefined"),
    "an answer to no choice": (QUESTIONS | {"answerKey": ["Z"]}, None, "arc_easy", "'Z' is not in"),
    "one bad row": (
        {"question": ["a?", "b?"], "choices": QUESTIONS["choices"] * 2, "answerKey": ["A", "Z"]},
        None,
        "arc_easy",
        "'Z' is not in list",
    ),
    "examples without answers": (
        ANSWERED,
        QUESTIONS,
        "arc_easy",
        "tasks.<name>.fewshot_dataset: lm-eval's arc_easy cannot use these data",
        "they have question, choices",
    ),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Puts back afterwards what a script sets for an lm-eval task's data."""
    for key in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "NLTK_DATA", "HF_TOKEN_PATH"):
        monkeypatch.setenv(key, str(tmp_path))


@pytest.fixture
def evaluate(stage, tmp_path):
    """Arguments that judge the tiny model by a task of the arc folder on the CPU."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.json").write_text(json.dumps({"folder": "arc"}))
    return ("evaluate", "--model", stage, "--task", seal(tmp_path / "task"), "--device", "cpu")


@pytest.mark.parametrize("case", TASKS)
def test_data_that_a_task_cannot_use(case, evaluate, tmp_path, capfd, home):
    columns, examples, name, *parts = TASKS[case]
    args = [*evaluate, "--dataset", save(tmp_path / "data", columns)]
    if examples is not None:
        args += ["--fewshot", save(tmp_path / "examples", examples)]
    params = {"kind": "lm_eval", "name": name, "version": 1}
    message = refused(capfd, tmp_path / "out", *args, params=params)
    assert not [part for part in parts if part not in message], message


def test_a_task_that_lm_eval_has_not(tmp_path, capfd, home):
    params = {"lm_eval": "arc_esay", "download": False, "version": 1}
    message = refused(capfd, tmp_path / "out", "prepare_task", params=params)
    assert message.startswith("Error: tasks.<name>.lm_eval: lm-eval has no task 'arc_esay'; ")
    assert "arc_easy" in message and "`lm-eval ls tasks` lists those that it has" in message


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_fewshot": 3}, "num_fewshot: 3 examples are asked for, fewshot_dataset has 1; set"),
        ({"chat_template": True}, "chat_template: this model's tokenizer has no chat template; se"),
    ],
)
def test_task_settings_that_do_not_fit(other, message, evaluate, tmp_path, capfd, home):
    data = save(tmp_path / "data", ANSWERED)
    params = {"kind": "lm_eval", "name": "arc_easy", "version": 1} | other
    args = (*evaluate, "--dataset", data, "--fewshot", data)
    assert message in refused(capfd, tmp_path / "out", *args, params=params)


def test_a_perplexity_of_too_short_a_text(stage, tmp_path, capfd):
    data = save(tmp_path / "data", SENTENCES[:3])
    params = {"kind": "perplexity", "column": "text", "window": 8, "windows": 99, "version": 1}
    args = ("evaluate", "--model", stage, "--dataset", data, "--device", "cpu")
    message = refused(capfd, tmp_path / "out", *args, params=params)
    assert "tasks.<name>.windows: 99 of 8 tokens were asked for" in message
    assert "lower it to" in message


def test_a_rank_above_what_was_decomposed(tmp_path, capfd):
    factors = tmp_path / "shard" / "factors"
    factors.mkdir(parents=True)
    pair = {"q.lora_A": torch.ones(4, 8), "q.lora_B": torch.ones(8, 4), "q.residual": torch.ones(5)}
    save_file(pair, factors / "block-00000.safetensors")
    params = {"rank": 5, "base_model": "m", "version": 1}
    message = refused(capfd, tmp_path / "out", "adapter", seal(tmp_path / "shard"), params=params)
    assert "rank 5 is above what q was decomposed to (4): raise adapters.<name>.max_rank" in message


def test_a_rank_above_a_layers_width(tmp_path, capfd):
    tensors = {"model.layers.0.k_proj.weight": {"dtype": "F32", "shape": [32, 64]}}
    content = {"outputs": {}, "tensors": {"model.safetensors": tensors}}
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    args = ("--name", "m", "--model", tmp_path, "--ranks", '{"adapters.e.ranks": [64]}')
    code, shown = run(capfd, "check_model", *args)
    assert code == 1 and "Traceback" not in shown
    assert "adapters.e.ranks: 64 is above the width of all layers of model m" in shown
    assert "lower the rank to at most 32" in shown


def test_a_metric_that_was_not_measured(tmp_path, capfd):
    results = tmp_path / "results"
    for folder in ("models/m", "evaluations/m/original/t"):
        (results / folder).mkdir(parents=True)
    tensors = {"model/model.safetensors": {"w": {"dtype": "F32", "shape": [2]}}}
    (results / "models/m" / manifest.NAME).write_text(json.dumps({"tensors": tensors}))
    measured = {"metrics": {"acc": {"value": 1, "higher_is_better": True}}, "primary": "acc"}
    (results / "evaluations/m/original/t/results.json").write_text(json.dumps(measured))
    original = {"model": "m", "variant": "original"}
    original |= dict.fromkeys(("compression", "adapter", "rank", "adapter_bits"))
    params = {"variants": [original], "tasks": ["t"], "metrics": {"t": "f1"}, "version": 1}
    params |= {"compressions": {}, "adapters": {}, "calibrations": {}}
    code, shown = run(capfd, "report", results, params=params)
    assert code == 1 and "Traceback" not in shown
    assert "tasks.t.metric: 'f1' was not measured; set it to one of acc" in shown
    assert not (results / "report.html").exists() and not (results / "summary.csv").exists()


# --- command lines ---

PARAMS = {
    "no JSON": ("{source", "--params is not JSON"),
    "no object": ("[1]", "--params is no JSON object"),
    "no such file": ("@not/here.json", "--params is not JSON", "No such file"),
    "unknown and missing keys": (
        '{"sourse": {}}',
        "--params has unknown: sourse; missing: source, version (known: source, version)",
    ),
}


@pytest.mark.parametrize("case", PARAMS)
def test_bad_parameters(case, tmp_path, capfd):
    text, *parts = PARAMS[case]
    code, shown = run(capfd, "download_dataset", "--params", text, "--out", tmp_path / "out")
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())  # typer's box
    assert code == 2 and "Traceback" not in shown and not (tmp_path / "out").exists()
    assert not [part for part in parts if part not in shown], shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there(stage, evaluate, tmp_path, capfd, home):
    params = {"kind": "lm_eval", "name": "arc_easy", "version": 1}
    args = (*evaluate[:-1], "cuda", "--out", tmp_path / "out")
    code, shown = run(capfd, *args, params=params)
    assert code == 2 and "Traceback" not in shown and not (tmp_path / "out").exists()
    assert "set runtime.device to" in " ".join(re.sub(r"[│]", " ", shown).split())


# Script -> an option that takes another stage's folder, here one that was not finished.
STAGES = {
    "adapter": (),
    "check_model": ("--model",),
    "compress": ("--model",),
    "covariance": ("--model",),
    "decompose": ("--compressed",),
    "evaluate": ("--task",),
    "quantize_adapter": ("--adapter",),
    "tokenize_text": ("--dataset",),
}


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_before_that_is_not_finished(script, tmp_path):
    """As its own process: what the shell sees."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *STAGES[script]]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stderr).split())
    assert done.returncode == 2 and "Traceback" not in shown
    assert "holds no finished result" in shown and "run its stage first" in shown, shown


def test_a_mistake_as_the_shell_sees_it(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "download_dataset.py"), "--path", "not/here"]
    command += ["--params", '{"source": {}, "version": 1}', "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "Error: datasets.<name>.path: not/here does not exist; name an existing one\n"
    )


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, capfd):
    params = {"source": {"rows": "no rows at all"}, "version": 1}
    put("d.jsonl", LINES)(tmp_path)
    with pytest.raises(TypeError):
        run(
            capfd,
            "download_dataset",
            *("--path", tmp_path / "d.jsonl", "--out", tmp_path / "out"),
            params=params,
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# --- disks ---


@contextlib.contextmanager
def mounted(folder, *options):
    """A disk of its own at ``folder``; skips where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def short_files(folder):
    """No file may be longer than 16 kB, as on a disk that is full by then."""
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(what, stage, folder):
    """Script, arguments and parameters that write more than a disk of ``folder`` holds."""
    if what == "model":
        return ("download_model", "--path", stage / "model"), {"source": {}, "version": 1}
    if what == "data":
        file = folder / "big.jsonl"
        file.write_text(LINES * 3000)
        return ("download_dataset", "--path", file), {"source": {}, "version": 1}
    data = save(folder, {"text": SENTENCES * 60})
    params = TOKENIZE | {"samples": 4000, "seqlen": 32, "layout": "documents"}
    return ("tokenize_text", "--model", stage, "--dataset", data), params


@pytest.mark.parametrize(
    ("what", "disk"),
    [
        ("model", "small disk"),  # across disks a model is copied, else linked
        ("data", "small disk"),
        ("data", "short files"),
        ("tokens", "small disk"),
        ("tokens", "short files"),
    ],
)
def test_a_disk_that_is_full(what, disk, stage, tmp_path, capfd):
    (tmp_path / "source").mkdir()
    args, params = fill(what, stage, tmp_path / "source")
    place = tmp_path / "disk"
    full = mounted(place, "size=96k") if disk == "small disk" else short_files(place)
    with full:
        message = refused(capfd, place / "out", *args, params=params)
        assert message.startswith(f"Error: {place / 'out'}: ")
        assert "No space left on device" in message or "File too large" in message
        assert "MB are free there. Free more, or set results to a folder on a larger" in message


def test_hidden_states_that_a_disk_has_no_room_for(tmp_path, monkeypatch):
    """An error that can be told, not the death of who fills a mapping of a file without room."""
    monkeypatch.setattr(covariance, "_room", lambda: 0)
    with (
        mounted(tmp_path / "disk", "size=96k") as disk,
        pytest.raises(OSError, match="No space left on device"),
    ):
        covariance.Hidden(torch.zeros(1, 64), 4096, disk)


def test_a_folder_that_may_not_be_written_to(tmp_path, capfd):
    put("d.jsonl", LINES)(tmp_path)
    with mounted(tmp_path / "disk", "ro") as disk:
        args = ("download_dataset", "--path", tmp_path / "d.jsonl")
        params = {"source": {}, "version": 1}
        message = refused(capfd, disk / "out", *args, params=params)
        assert f"{disk / 'out'}: Read-only file system. Give this user access" in message


def test_a_file_where_a_folder_goes(tmp_path, capfd):
    put("d.jsonl", LINES)(tmp_path)
    put("results", "")(tmp_path)
    args = ("download_dataset", "--path", tmp_path / "d.jsonl")
    for out in (tmp_path / "results", tmp_path / "results" / "datasets"):
        message = refused(capfd, out, *args, params={"source": {}, "version": 1})
        assert f"{tmp_path / 'results'}: a file lies where a folder goes. Move it" in message
