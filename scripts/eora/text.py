"""Text data sets: fetched ones read from disk, and cut into token windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eora.errors import Mistake
from eora.sources import check_column

Layout = Literal["packed", "documents"]


def texts(folder: Path, column: str, empty: bool = False) -> Iterator[str]:
    """The texts of one column of a saved data set, in order; of empty ones only if asked.

    Raises:
        Mistake: the data set has no such column, or no text in it; the message lists its columns.
    """
    data: Dataset = load_from_disk(str(folder))
    check_column(data, column, "text")
    kinds = {name: getattr(kind, "dtype", "nested") for name, kind in data.features.items()}
    if kinds[column] not in ("string", "large_string"):
        has = ", ".join(name for name in kinds if "string" in kinds[name]) or "none"
        raise Mistake(
            f"datasets.<name>.text: the column {column!r} holds {kinds[column]}, not text; "
            f"columns of text: {has}"
        )
    return (text or "" for text in data[column] if empty or (text and text.strip()))


def windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Token samples of a text.

    Args:
        documents: the texts, in order.
        samples: how many samples to cut; all are needed.
        seqlen: tokens a sample at most.
        layout: ``packed`` concatenates documents, the tokenizer's end token after each, and cuts
            windows of exactly seqlen; ``documents`` takes one document a sample, truncated, and
            pads shorter ones on the right.

    Returns:
        input_ids (samples, seqlen) int32 and lengths (samples,) int32.

    Raises:
        Mistake: the text is too short for that many samples.
    """
    if layout == "packed":
        stream = _stream(documents, tokenizer, samples * seqlen)
        rows, found = _cut(stream, seqlen), f"{len(stream):,} tokens"
    else:
        tokenized = (tokenizer(document, verbose=False)["input_ids"] for document in documents)
        rows = list(islice((ids[:seqlen] for ids in tokenized if ids), samples))
        found = f"{len(rows):,} documents"
    if len(rows) < samples:
        keys = ("calibrations.<name>.samples", "calibrations.<name>.seqlen")
        raise _too_few(keys, samples, seqlen, found, len(rows))
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    input_ids = torch.zeros(samples, seqlen, dtype=torch.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return input_ids, lengths


def _stream(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: float
) -> list[int]:
    """Tokens of documents, the tokenizer's end token after each; no more documents than it takes
    for so many."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, verbose=False)["input_ids"] + end
        if len(stream) >= wanted:
            return stream[: int(wanted)]
    return stream


def _cut(stream: list[int], length: int) -> list[list[int]]:
    """Its full windows, one after the other."""
    return [stream[end - length : end] for end in range(length, len(stream) + 1, length)]


def _too_few(keys: tuple[str, str], asked: int, length: int, found: str, have: int) -> Mistake:
    """Told by the keys of the number and of the length."""
    return Mistake(
        f"{keys[0]}: {asked:,} of {length:,} tokens were asked for, but the data set has "
        f"{found}, which make {have:,}; "
        + (f"lower it to {have:,}" if have else f"lower {keys[1]} as well")
        + ", or name a larger data set"
    )


def perplexity_windows(
    rows: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int | None,
    length: int,
    join: str | None,
) -> Tensor:
    """Token windows to measure perplexity over, one after the other.

    Args:
        rows: of the data set, in order.
        count: how many; None takes all that are full.
        length: tokens of each.
        join: what stands between rows. They are one text then, of which the tokenizer makes one
            sequence, with one start token if it adds any: so papers on compression measure
            WikiText-2 since GPTQ (arXiv 2210.17323). None takes each row for a text of its own,
            with the tokenizer's end token after it.

    Returns:
        (count, length) int32.

    Raises:
        Mistake: the text is too short for that many.
    """
    if join is None:
        stream = _stream(rows, tokenizer, math.inf if count is None else count * length)
    else:
        stream = tokenizer(join.join(rows), verbose=False)["input_ids"]
    found = _cut(stream, length)
    if len(found) < (1 if count is None else count):
        have = f"{len(stream):,} tokens"
        if count is None:
            raise Mistake(
                f"tasks.<name>.window: the data set has {have}, fewer than one window of "
                f"{length:,}; lower it, or name a larger data set"
            )
        keys = ("tasks.<name>.windows", "tasks.<name>.window")
        raise _too_few(keys, count, length, have, len(found))
    return torch.tensor(found[:count], dtype=torch.int32)


def mixture(
    parts: Iterable[tuple[Iterable[str], int]],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Samples of several texts, those of one after those of the other; see :func:`windows`.

    Args:
        parts: documents, and how many samples to cut from them.
    """
    cut = [windows(documents, tokenizer, count, seqlen, layout) for documents, count in parts]
    input_ids, lengths = (torch.cat(some) for some in zip(*cut, strict=True))
    return input_ids, lengths
