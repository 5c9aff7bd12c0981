"""Text data sets: fetched ones read from disk, and cut into token windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eora.errors import Mistake
from eora.sources import check_column

Layout = Literal["packed", "documents"]


def texts(folder: Path, column: str) -> Iterator[str]:
    """The non-empty texts of one column of a saved data set, in order.

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
    return (text for text in data[column] if text and text.strip())


def windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    layout: Layout,
    keys: tuple[str, str] = ("calibrations.<name>.samples", "calibrations.<name>.seqlen"),
) -> tuple[Tensor, Tensor]:
    """Token samples of a text.

    Args:
        documents: the texts, in order.
        samples: how many samples to cut; all are needed.
        seqlen: tokens a sample at most.
        layout: ``packed`` concatenates documents, the tokenizer's end token after each, and cuts
            windows of exactly seqlen; ``documents`` takes one document a sample, truncated, and
            pads shorter ones on the right.
        keys: where the config says samples and seqlen, for the message.

    Returns:
        input_ids (samples, seqlen) int32 and lengths (samples,) int32.

    Raises:
        Mistake: the text is too short for that many samples.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    rows: list[list[int]] = []
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        if layout == "packed":
            stream += ids + end
            if len(stream) >= samples * seqlen:
                rows = [stream[i * seqlen : (i + 1) * seqlen] for i in range(samples)]
                break
        elif ids:
            rows.append(ids[:seqlen])
            if len(rows) == samples:
                break
    if len(rows) < samples:
        packed = layout == "packed"
        have = len(stream) // seqlen if packed else len(rows)
        found = f"{len(stream):,} tokens" if packed else f"{len(rows):,} documents"
        raise Mistake(
            f"{keys[0]}: {samples:,} of {seqlen:,} tokens were asked for, but the data set has "
            f"{found}, which make {have:,}; "
            + (f"lower it to {have:,}" if have else f"lower {keys[1]} as well")
            + ", or name a larger data set"
        )
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    input_ids = torch.zeros(samples, seqlen, dtype=torch.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return input_ids, lengths


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
