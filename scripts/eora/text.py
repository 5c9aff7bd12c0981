"""Text data sets: fetched ones read from disk, and cut into token windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Layout = Literal["packed", "documents"]


def texts(folder: Path, column: str) -> Iterator[str]:
    """The non-empty texts of one column of a saved data set, in order.

    Raises:
        KeyError: the data set has no such column; the message lists those it has.
    """
    data: Dataset = load_from_disk(str(folder))
    if column not in data.column_names:
        raise KeyError(
            f"datasets.<name>.text is {column!r}, but the data set has {data.column_names}"
        )
    return (text for text in data[column] if text and text.strip())


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
        ValueError: the text is too short for that many samples.
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
        else:
            rows.append(ids[:seqlen])
            if len(rows) == samples:
                break
    if len(rows) < samples:
        have = len(stream) // seqlen if layout == "packed" else len(rows)
        raise ValueError(
            f"the data set gives only {have} samples of {seqlen} tokens, {samples} were asked for: "
            "lower samples or seqlen, or name a larger data set"
        )
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    input_ids = torch.zeros(samples, seqlen, dtype=torch.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return input_ids, lengths
