"""What config.yaml means: checked against the schema and against itself, and turned into jobs.

Needs neither torch nor Snakemake, so that a mistake is reported in a second.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from eora import manifest, sources
from eora.errors import Mistake

Config = dict[str, Any]

ORIGINAL = "original"
_BLOCK = re.compile(r"\.\d+\.")
_TYPES = {
    "object": "a section (keys with values below it)",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}
# After one of these mistakes the config has not the shape that the checks of _mistakes rely on.
_SHAPE = ("type", "required", "minItems")
# The keys that mean something only beside the one that says how a task judges.
_TASK_KEYS = {
    "lm_eval": ("dataset", "fewshot_dataset", "num_fewshot", "limit", "chat_template", "metric"),
    "perplexity": ("window", "windows", "join"),
}
# What each method of compression goes by, beside its calibration.
_ROUNDED = ("bits", "group_size", "sym")
METHOD_KEYS = {
    "autoround": (*_ROUNDED, "iters", "batch_size", "format", "alg_ext", "keep", "seed", "around"),
    "gptq": (*_ROUNDED, "keep"),
    "awq": (*_ROUNDED, "keep"),
    "sparsegpt": ("sparsity", *_ROUNDED, "keep"),
    "wanda": ("sparsity", *_ROUNDED, "keep"),
    "existing": ("model", "checkpoint"),
    "rescale": ("compression", "rank", "rounds"),
}
PRUNERS = ("sparsegpt", "wanda")
ONE_SHOT = ("gptq", "awq", *PRUNERS)  # by llm-compressor


class ConfigError(Mistake):
    """The config does not fit; the message names every bad key and how to mend it."""


# What PyYAML finds wrong -> how to mend it.
_YAML_MENDS = {
    r"'\t'": "indent with spaces, not with tabs",
    "undefined alias": "write the & of that name above, or put text that begins with * in quotes",
    "scanning an a": "put text that begins with * or & in quotes",
    "for merging": "give << the alias of a section (*name), or a list of such",
    "mapping values are not allowed": "mend the indentation, or put text that holds ': ' in quotes",
    "another document": "remove the second ---",
    "unhashable key": "a key is one word: put text that begins with { or [ in quotes",
    "for the tag": "put text that begins with ! in quotes",
    "written twice": "keep one of them",
    "YAML reads": "write a plain decimal number, or put what is meant as text in quotes",
}
_INTEGER = "tag:yaml.org,2002:int"


class _StrictLoader(yaml.SafeLoader):
    """Refuses what YAML takes in silence: a key given twice, and numbers that are not decimal."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Node] = {}
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            first = seen.setdefault(key.value, key)
            if first is not key:
                line = first.start_mark.line + 1
                problem = f"the key {key.value} is written twice, first in line {line}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag == _INTEGER and re.match(r"[-+]?0.|.*:", node.value):
            problem = f"YAML reads {node.value} as {self.construct_yaml_int(node)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node


def check_file(path: Path) -> None:
    """Refuse a config file that is no YAML, or that YAML reads otherwise than it looks.

    Raises:
        ConfigError: naming the file, the line and the mend.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text)
            text = text.replace("\t", " ")  # which JSON may indent with
        except ValueError:
            pass
        config = yaml.load(text, _StrictLoader)
        json.dumps(config, skipkeys=True, default=str)  # an anchor within itself has no end
    except yaml.MarkedYAMLError as error:
        told = f"{error.context} {error.problem}"
        mends = (mend for found, mend in _YAML_MENDS.items() if found in told)
        mend = next(mends, "mend the indentation, the quotes or the brackets here or above")
        where = error.problem_mark
        raise ConfigError(
            f"{path}, line {where.line + 1}: {error.problem}; {mend}\n{where.get_snippet()}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file that can be read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; mend this value, or put it in quotes") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: {_shown(config)} is no section; write models: and tasks: in it")


def load_schema(path: Path) -> dict[str, Any]:
    """The config's JSON schema, from YAML."""
    return yaml.safe_load(path.read_text())


def _fill_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy of ``value`` with every absent key that has a default filled in."""
    if isinstance(value, list):
        return [_fill_defaults(v, schema.get("items", {})) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 16.0 passes for a whole number, and is to mean the same
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    filled = {
        key: entry["default"]
        for key, entry in known.items()
        if "default" in entry and key not in value
    }
    rest = schema.get("additionalProperties")
    below = {key: known.get(key, rest if isinstance(rest, dict) else {}) for key in value | filled}
    return {key: _fill_defaults(v, below[key]) for key, v in (value | filled).items()}


def _shown(value: Any) -> str:
    """The value as one would write it in YAML, cut where it is long."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = yaml.safe_dump(value, allow_unicode=True, width=1000)
        text = text.removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:80]}..."


def _dotted(*parts: Any) -> str:
    return ".".join(part if isinstance(part, str) else _shown(part) for part in parts)


def _odd_keys(value: Any, *where: Any) -> Iterator[str]:
    """Keys that YAML did not read as text: numbers, dates, on, no, ~."""
    for key, below in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str):
            place = _dotted(*where, key)
            yield f"{place}: YAML reads this key as {_shown(key)}, not as text; put it in quotes"
        yield from _odd_keys(below, *where, key)


def _fits_unquoted(value: Any, schema: dict[str, Any]) -> bool:
    """Whether text would be what the schema wants, had it not been in quotes."""
    if not isinstance(value, str):
        return False
    try:
        return Draft202012Validator(schema).is_valid(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError):
        return False


def _explain(error: ValidationError, defs: dict[str, Any]) -> Iterator[str]:
    """One line for each mistake behind a schema error: key, what is wrong, how to mend it."""
    at, value, wanted = error.absolute_path, error.instance, error.validator_value
    where = _dotted(*at) or "the config"
    meaning = error.schema.get("description", "")
    wrong = error.message if len(error.message) < 200 else f"{error.message[:200]}..."
    if "propertyNames" in error.absolute_schema_path:
        where, wrong = _dotted(*at, value), f"{_shown(value)} is no usable name"
    elif error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        for key in (k for k in value if isinstance(k, str) and k not in known):
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            yield f"{_dotted(*at, key)}: unknown key; {mend}"
        return
    elif error.validator == "required":
        for key in (k for k in wanted if k not in value):
            hint = error.schema["properties"][key]["description"]
            yield f"{_dotted(*at, key)}: missing; it is needed: {hint}"
        return
    elif error.validator == "type":
        kinds = wanted if isinstance(wanted, list) else [wanted]
        types = " or ".join(_TYPES[kind] for kind in kinds)
        wrong = f"{_shown(value)} is not {types}"
        if value is None:
            wrong = f"empty; give {types}" + (", or remove it" if "default" in error.schema else "")
        elif wanted == "string" and isinstance(value, bool):
            wrong += " (so YAML reads no, off, yes and on), put it in quotes"
        elif wanted == "string" and not isinstance(value, list | dict):
            wrong += ", put it in quotes"
        elif _fits_unquoted(value, error.schema | {"$defs": defs}):
            wrong += ", remove the quotes"
        elif wanted == "array" and not isinstance(value, dict):
            wrong += f", write [{_shown(value)}]"
    elif error.validator == "enum":
        wrong = f"{_shown(value)} is none of {', '.join(_shown(v) for v in wanted)}"
        if _fits_unquoted(value, error.schema | {"$defs": defs}):
            wrong += ", remove the quotes"
    elif error.validator == "pattern":
        wrong = f"{_shown(value)} does not fit"
        if _fits_unquoted(value, error.schema | {"$defs": defs}):
            wrong += ", remove the quotes"
    yield f"{where}: {wrong}; {meaning}" if meaning else f"{where}: {wrong}"


def _source_mistakes(where: str, entry: Config) -> Iterator[str]:
    kinds = [kind for kind in ("hub", "wheel", "path") if kind in entry]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        yield f"{where}: give exactly one of hub, wheel and path (found {found})"
        return
    needs = {"hub": {"revision"}, "wheel": {"sha256", "member"}, "path": set()}
    extra = {"hub": {"name", "data_files"}, "wheel": set(), "path": set()}
    for key in sorted(needs[kinds[0]] - set(entry)):
        yield f"{where}.{key}: missing; a {kinds[0]} source needs it"
    for other in (kind for kind in needs if kind not in kinds):
        for key in sorted((needs[other] | extra[other]) & set(entry)):
            yield f"{where}.{key}: belongs to a {other} source; remove it"
    if "path" in entry and not os.path.exists(os.path.expanduser(entry["path"])):
        yield f"{where}.path: {entry['path']} does not exist; name an existing file or folder"
    rows = entry.get("rows")
    if rows and rows[0] >= rows[1]:
        yield f"{where}.rows: {rows} is empty; give [first, end) with first below end"


def _kind_mistakes(where: str, entry: Config) -> Iterator[str]:
    """A local model of a kind that is not supported, or no original; what else is wrong, its fetch
    tells."""
    file = Path(os.path.expanduser(entry.get("path", "")), "config.json")
    try:
        stored = json.loads(file.read_text()) if "path" in entry and file.is_file() else {}
    except (OSError, ValueError):
        return
    if not isinstance(stored, dict):
        return
    if why := sources.unsupported_kind(stored):
        yield f"{where}.path: {why}; name another model"
    elif why := sources.compressed_already(stored):
        yield f"{where}.path: {why}"


def _reference(where: str, name: str, section: str, config: Config) -> Iterator[str]:
    known = config[section]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        yield f"{where}: {section} has no entry {name!r}; {mend}"


def _task_mistakes(
    where: str, task: Config, config: Config, known: dict[str, Any]
) -> Iterator[str]:
    kinds = [kind for kind in _TASK_KEYS if kind in task]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        yield f"{where}: give exactly one of lm_eval and perplexity (found {found})"
        return
    (other,) = set(_TASK_KEYS) - set(kinds)
    # A default is filled in by now: it cannot be told from one that was written, and does no harm.
    for key in (k for k in _TASK_KEYS[other] if task.get(k) != known[k].get("default")):
        yield f"{where}.{key}: goes with {other}, not with {kinds[0]}; remove it"
    for key in ("perplexity", "dataset", "fewshot_dataset"):
        if key in task:
            yield from _reference(f"{where}.{key}", task[key], "datasets", config)
    if "fewshot_dataset" in task and "dataset" not in task:
        yield f"{where}.fewshot_dataset: only goes with dataset; remove it or add dataset"
    if "dataset" in task and task.get("num_fewshot") and "fewshot_dataset" not in task:
        yield f"{where}.num_fewshot: its examples need fewshot_dataset, as dataset has one split"


def _calibration_mistakes(where: str, entry: Config, config: Config) -> Iterator[str]:
    if ("dataset" in entry) == ("mix" in entry):
        found = "both" if "mix" in entry else "neither"
        yield f"{where}: give exactly one of dataset and mix (found {found})"
    elif "dataset" in entry:
        yield from _reference(f"{where}.dataset", entry["dataset"], "datasets", config)
    else:
        for name in entry["mix"]:
            yield from _reference(f"{where}.mix.{name}", name, "datasets", config)
        total = sum(entry["mix"].values())
        if abs(total - 1) > 1e-6:
            yield f"{where}.mix: the shares add up to {total:g}; make them add up to 1"
        for name in (name for name, count in shares(entry).items() if count < 1):
            yield (
                f"{where}.mix.{name}: gives none of {entry['samples']} samples; "
                "raise samples or its share, or remove it"
            )


def shares(entry: Config) -> dict[str, int]:
    """Data set -> the samples that a calibration takes of it, by name: key order means nothing.

    Shares that give no whole number of samples go down, and the largest remainders up again.
    """
    if "dataset" in entry:
        return {entry["dataset"]: entry["samples"]}
    exact = {name: share * entry["samples"] for name, share in sorted(entry["mix"].items())}
    counts = {name: int(amount + 1e-9) for name, amount in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: max(0, entry["samples"] - sum(counts.values()))]:
        counts[name] += 1
    return counts


def settings(entry: Config) -> Config:
    """The keys of a compression's entry that its method goes by, beside its calibration."""
    keys = METHOD_KEYS[entry["method"]]
    if "bits" not in entry:
        keys = tuple(key for key in keys if key not in _ROUNDED)
    found = {"method": entry["method"], **pick(entry, keys)}
    return found | ({"checkpoint": origin(entry["checkpoint"])} if "checkpoint" in entry else {})


def integers(compressions: Mapping[str, Config], name: str) -> Config:
    """The entry of the compression that a compression has its integers of, as far as it is known:
    itself, but where it is one with new scales."""
    entry = compressions[name]
    while entry["method"] == "rescale" and entry["compression"] in compressions:
        entry = compressions[entry["compression"]]
    return entry


def applies(compressions: Mapping[str, Config], name: str, model: str) -> bool:
    """Whether a compression is made of a model: an existing one belongs to one alone."""
    return integers(compressions, name).get("model", model) == model


def beside(config: Config, compression: str) -> Iterator[str]:
    """The adapters that are fitted to a compression."""
    for name, entry in config["adapters"].items():
        if compression in entry.get("compressions", (compression,)):
            yield name


def calibrated_on_compressed(adapter: Config) -> bool:
    """Whether an adapter is fitted to what the compressed model's layers read."""
    return adapter["calibrate_on"] == "compressed"


def _compression_mistakes(
    where: str, entry: Config, config: Config, known: dict[str, Any]
) -> Iterator[str]:
    method = entry["method"]
    if method not in METHOD_KEYS:
        return
    needed = ["model", "checkpoint"] if method == "existing" else ["calibration"]
    needed += ["compression", "rank"] if method == "rescale" else []
    needed += ["bits"] if method in ("autoround", "gptq", "awq") else []
    for key in needed:
        if key not in entry:
            yield f"{where}.{key}: missing; it is needed: {known[key]['description']}"
    allowed = {"method", *METHOD_KEYS[method], *(() if method == "existing" else ["calibration"])}
    for key in sorted((entry.keys() & known.keys()) - allowed):
        # A default is filled in by now: it cannot be told from one that was written.
        if entry[key] != known[key].get("default"):
            others = [name for name, keys in METHOD_KEYS.items() if key in keys]
            goes = ", ".join(others) or "methods that calibrate"
            yield f"{where}.{key}: goes with {goes}, not with {method}; remove it"
    if method == "existing":
        if "model" in entry:
            yield from _reference(f"{where}.model", entry["model"], "models", config)
        if "checkpoint" in entry:
            yield from _source_mistakes(f"{where}.checkpoint", entry["checkpoint"])
    if "calibration" in entry:
        name = entry["calibration"]
        yield from _reference(f"{where}.calibration", name, "calibrations", config)
        layout = config["calibrations"].get(name, {}).get("layout")
        if layout == "documents" and method != "rescale":
            yield (
                f"{where}.calibration: compressing wants full windows; "
                f"set calibrations.{name}.layout to packed, or name another"
            )
    if "around" in entry and method == "autoround":
        yield from _around_mistakes(f"{where}.around", entry["around"], config)
    if "compression" in entry and method == "rescale":
        yield from _rescale_mistakes(where, entry, config)
    if method in PRUNERS and ":" in entry["sparsity"]:
        zeros, of = map(int, entry["sparsity"].split(":"))
        if zeros >= of:
            yield f'{where}.sparsity: {zeros} of {of} leaves nothing; take fewer, such as "2:4"'
    if method == "autoround" and "bits" in entry:
        if entry["format"] == "auto_gptq" and not entry["sym"]:
            yield (
                f"{where}.format: auto_gptq with asymmetric {entry['bits']}-bit weights cannot be "
                "loaded back (at 2 bits it cannot even hold them); set format to auto_round, or "
                "sym to true"
            )
        if entry["format"] == "auto_round" and entry["bits"] == 4 and not entry["sym"]:
            yield (
                f"{where}.bits: AutoRound packs asymmetric 4-bit weights for AWQ kernels, "
                "which are not installed here; set sym to true"
            )


def _before_mistakes(where: str, name: str, config: Config) -> Iterator[str]:
    """What a compression is made from must be there, and must not be made from itself."""
    where = f"{where}.compression"
    yield from _reference(where, name, "compressions", config)
    last = _before(name, config)[-1:]
    if last and made_from(config["compressions"][last[0]]) in config["compressions"]:
        yield f"{where}: {last[0]} is made from itself; name one made before it"


def _around_mistakes(where: str, around: Config, config: Config) -> Iterator[str]:
    """An adapter that is there, and that every model has."""
    yield from _before_mistakes(where, around["compression"], config)
    yield from _reference(f"{where}.adapter", around["adapter"], "adapters", config)
    fitted = config["adapters"].get(around["adapter"], {})
    if "tune" in fitted:
        yield f"{where}.adapter: {around['adapter']} is fine-tuned; name one without tune"
    limit = fitted.get("max_rank", around["rank"])
    if around["rank"] > limit:
        yield (
            f"{where}.rank: {around['rank']} is above adapters.{around['adapter']}.max_rank "
            f"{limit}; raise max_rank (this remakes the decompositions) or lower the rank"
        )
    before = _before(around["compression"], config)
    if any(config["compressions"][name]["method"] == "existing" for name in before):
        yield (
            f"{where}.compression: {around['compression']} is an existing checkpoint, which "
            "belongs to one model; name one that is made of every model"
        )
    if any(config["compressions"][name]["method"] == "awq" for name in before):
        yield (
            f"{where}.compression: {around['compression']} is made by awq, whose adapters stand "
            "beside layers that it rescaled, not beside the original's; name one by another method"
        )


def _rescale_mistakes(where: str, entry: Config, config: Config) -> Iterator[str]:
    """There must be scales to fit."""
    name = entry["compression"]
    yield from _before_mistakes(where, name, config)
    before = config["compressions"].get(name, {})
    if before.get("method") in PRUNERS and "bits" not in before:
        yield f"{where}.compression: {name} is not rounded, so it has no scales; name one with bits"


def made_from(entry: Config) -> str | None:
    """The compression that another is made from, if it is."""
    return (entry.get("around") or entry).get("compression")


def needs_adapter(entry: Config) -> bool:
    """Whether a compression is made to have an adapter beside it, and is of no use without."""
    return made_from(entry) is not None


def _before(name: str, config: Config) -> list[str]:
    """A compression and those that it is made from in turn, as far as they are there, each once."""
    found: list[str] = []
    while name in config["compressions"] and name not in found:
        found.append(name)
        name = made_from(config["compressions"][name]) or ""
    return found


def bare(compressions: Mapping[str, Config], name: str) -> str:
    """The compression whose loss an adapter makes up for: one made around an adapter is of no use
    without, so that which its first round began with.

    Args:
        compressions: by name, with what each is made from.
        name: one of them, or the name of none.
    """
    while name in compressions and needs_adapter(compressions[name]):
        name = made_from(compressions[name])
    return name


def _mistakes(config: Config, schema: dict[str, Any]) -> Iterator[str]:
    """What the schema cannot say: references between sections, and settings that clash."""
    for section in ("models", "datasets"):
        for name, entry in config[section].items():
            yield from _source_mistakes(f"{section}.{name}", entry)
    for name, entry in config["models"].items():
        yield from _kind_mistakes(f"models.{name}", entry)
    for name, entry in config["calibrations"].items():
        yield from _calibration_mistakes(f"calibrations.{name}", entry, config)
    known = schema["properties"]["compressions"]["additionalProperties"]["properties"]
    for name, entry in config["compressions"].items():
        where = f"compressions.{name}"
        if name == ORIGINAL:
            yield f"{where}: the name is taken by the uncompressed model; choose another"
        yield from _compression_mistakes(where, entry, config, known)
        if needs_adapter(entry) and not any(beside(config, name)):
            yield (
                f"{where}: no adapter is fitted to it, and it is of no use without one; add it to "
                "adapters.<name>.compressions, or remove that key"
            )
    for name, entry in config["adapters"].items():
        where = f"adapters.{name}"
        yield from _reference(f"{where}.calibration", entry["calibration"], "calibrations", config)
        for compression in entry.get("compressions", ()):
            yield from _reference(f"{where}.compressions", compression, "compressions", config)
        if calibrated_on_compressed(entry):
            for compression, made in config["compressions"].items():
                if name in beside(config, compression) and needs_adapter(made):
                    yield (
                        f"{where}.calibrate_on: {compression} is of no use without an adapter, and "
                        "so is what its layers read then; take original, or leave it out of "
                        f"{where}.compressions"
                    )
        for rank in entry["ranks"]:
            if rank > entry["max_rank"]:
                yield (
                    f"{where}.ranks: {rank} is above max_rank {entry['max_rank']}; "
                    "raise max_rank (this remakes the decompositions) or lower the rank"
                )
        if "tune" in entry:
            where, tuned_on = f"{where}.tune", entry["tune"]["calibration"]
            yield from _reference(f"{where}.calibration", tuned_on, "calibrations", config)
            if entry["bits"] != [16]:
                yield (
                    f"{where}: a fine-tuned adapter is kept in 16 bits; "
                    f"write adapters.{name}.bits: [16]"
                )
    known = schema["properties"]["tasks"]["additionalProperties"]["properties"]
    for name, task in config["tasks"].items():
        yield from _task_mistakes(f"tasks.{name}", task, config, known)


def validate(config: Config, schema: dict[str, Any]) -> Config:
    """The config with defaults filled in.

    Raises:
        ConfigError: listing every mistake, each with its key and mend.
    """
    odd = list(_odd_keys(config))
    errors = list(Draft202012Validator(schema).iter_errors(config))
    mistakes = odd + [line for error in errors for line in _explain(error, schema["$defs"])]
    if not odd and not any(error.validator in _SHAPE for error in errors):
        config = _fill_defaults(config, schema)
        mistakes += _mistakes(config, schema)
    if mistakes:
        raise ConfigError("\n".join(f"- {line}" for line in dict.fromkeys(mistakes)))
    return config


def _of_model(config: Config, model: str) -> tuple[dict[str, Config], dict[str, Config]]:
    """The compressions that are made of a model, and the adapters that go beside them."""
    every = config["compressions"]
    made = {name: entry for name, entry in every.items() if applies(every, name, model)}
    fitted = {adapter for name in made for adapter in beside(config, name)}
    return made, {name: entry for name, entry in config["adapters"].items() if name in fitted}


def asked_ranks(config: Config, model: str) -> dict[str, list[int]]:
    """Key of the config -> the ranks that it asks for of a model, to judge or to round around."""
    compressions, adapters = _of_model(config, model)
    found = {f"adapters.{name}.ranks": entry["ranks"] for name, entry in adapters.items()}
    for name, entry in compressions.items():
        if "around" in entry:
            found[f"compressions.{name}.around.rank"] = [entry["around"]["rank"]]
        if entry["method"] == "rescale":
            found[f"compressions.{name}.rank"] = [entry["rank"]]
    return found


def choices(config: Config, model: str) -> dict[str, Config]:
    """By what the compressions of a model choose its layers: name -> group_size and keep."""
    made, _ = _of_model(config, model)
    return {
        name: {"group_size": entry["group_size"] if "bits" in entry else -1, "keep": entry["keep"]}
        for name, entry in made.items()
        if "keep" in METHOD_KEYS[entry["method"]]
    }


def plain_alone(config: Config, model: str) -> list[str]:
    """Keys that ask for what works on plain linear layers alone, of those that apply to a model."""
    made, fitted = _of_model(config, model)
    return [
        *(f"compressions.{name}.method" for name, e in made.items() if e["method"] in ONE_SHOT),
        *(f"compressions.{name}.around" for name, e in made.items() if "around" in e),
        *(f"adapters.{name}.tune" for name, e in fitted.items() if "tune" in e),
    ]


def is_gguf(model: Config) -> bool:
    """Whether a model's entry names a GGUF file, which is converted."""
    return model.get("path", model.get("member", "")).endswith(".gguf")


def known_weights(entry: Config, made: Path) -> manifest.Manifest | None:
    """What can be told of a model's weights before any job runs.

    Args:
        entry: the model's entry in the config.
        made: where the manifest of its download is, once it is made.

    Returns:
        That manifest, or the headers of a local folder's safetensors; None where neither is there
        (the download checks the ranks itself).

    Raises:
        Mistake: the local folder's weights are not whole.
    """
    if made.is_file():
        return manifest.load(made)
    folder = Path(entry.get("path", "")).expanduser()
    if "path" not in entry or not folder.is_dir():
        return None
    files = sources.weight_files(folder)
    return {"tensors": {file.name: manifest.tensor_shapes(file) for file in files}}


def check_ranks(model: manifest.Manifest, name: str, ranks: dict[str, list[int]]) -> None:
    """Refuse ranks above the width of all of the model's decoder layers; narrower ones are
    repaired whole.

    Args:
        model: manifest of the model's download.
        name: the model's name in the config.
        ranks: see :func:`asked_ranks`.

    Raises:
        ConfigError: naming the rank and the widest layer.
    """
    widths = {
        layer: min(entry["shape"])
        for layer, entry in manifest.tensors(model).items()
        if layer.endswith(".weight") and len(entry["shape"]) == 2 and _BLOCK.search(layer)
    }
    if not widths:
        return
    widest = max(widths, key=lambda layer: widths[layer])
    mistakes = [
        f"- {key}: {rank} is above the width of all layers of model {name}, such as {widest} "
        f"({widths[widest]}); lower the rank to at most {widths[widest]}"
        for key, wanted in ranks.items()
        for rank in wanted
        if rank > widths[widest]
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


@dataclass(frozen=True)
class Variant:
    """One thing to judge: a model as it is, compressed, or compressed with an adapter."""

    model: str
    compression: str | None = None
    adapter: str | None = None
    rank: int | None = None
    adapter_bits: int | None = None
    tuned: bool = False

    @property
    def name(self) -> str:
        """Unique within the model, and a file name."""
        if self.compression is None:
            return ORIGINAL
        if self.adapter is None:
            return self.compression
        return f"{self.compression}+{self.adapter}-r{self.rank}-{self.adapter_bits}bit"

    @property
    def model_folder(self) -> str:
        """Where its model lies in the results: the original's, or the compressed one's."""
        if self.compression is None:
            return f"models/{self.model}"
        return f"compressed/{self.model}/{self.compression}"

    @property
    def adapter_folder(self) -> str | None:
        """Where its adapter lies in the results, if it has one."""
        if self.adapter is None:
            return None
        form = "tuned" if self.tuned else f"{self.adapter_bits}bit"
        return f"adapters/{self.model}/{self.compression}/{self.adapter}/r{self.rank}-{form}"

    @property
    def fitted(self) -> Variant:
        """The variant with its adapter as it was fitted: neither rounded nor fine-tuned."""
        return replace(self, adapter_bits=16, tuned=False)

    def row(self) -> Config:
        """The variant as plain data, for the report."""
        return {"variant": self.name, **asdict(self)}


def variants(config: Config) -> list[Variant]:
    """All variants that the config names: each model x compression x its adapters x rank x bits.

    A compression made around an adapter is not judged without one: it is of no use then.
    """
    found = []
    for model in config["models"]:
        found.append(Variant(model))
        for compression, made in config["compressions"].items():
            if not applies(config["compressions"], compression, model):
                continue
            if not needs_adapter(made):
                found.append(Variant(model, compression))
            for adapter in beside(config, compression):
                entry = config["adapters"][adapter]
                found += [
                    Variant(model, compression, adapter, rank, bits, "tune" in entry)
                    for rank in entry["ranks"]
                    for bits in entry["bits"]
                ]
    return found


def pick(entry: Config, keys: tuple[str, ...]) -> Config:
    """The entry's items under ``keys``, those that it has."""
    return {key: entry[key] for key in keys if key in entry}


def origin(entry: Config) -> str:
    """Where a model comes from, in words that mean the same on every machine."""
    if "hub" in entry:
        return entry["hub"]
    if "wheel" in entry:
        return f"{entry['wheel']}:{entry['member']}"
    return Path(entry["path"]).name
