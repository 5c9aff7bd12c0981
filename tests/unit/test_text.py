"""Texts cut into token samples."""

import pytest
from datasets import Dataset

from conftest import SENTENCES, make_tokenizer
from eora import text
from eora.errors import Mistake

TOKENIZER = make_tokenizer()


def test_packed_windows_are_the_joined_text():
    ids, lengths = text.windows(SENTENCES, TOKENIZER, 5, 16, "packed")
    joined = [t for s in SENTENCES for t in TOKENIZER(s)["input_ids"] + [TOKENIZER.eos_token_id]]
    assert ids.flatten().tolist() == joined[: 5 * 16]
    assert lengths.tolist() == [16] * 5


def test_documents_are_cut_and_padded():
    documents = [SENTENCES[0], " ".join(SENTENCES[:9]), SENTENCES[1]]
    ids, lengths = text.windows(documents, TOKENIZER, 3, 40, "documents")
    for row, length, document in zip(ids, lengths, documents, strict=True):
        expected = TOKENIZER(document)["input_ids"][:40]
        assert length == len(expected)
        assert row[:length].tolist() == expected and not row[length:].any()


def test_perplexity_is_over_texts_apart_or_over_one():
    apart = text.perplexity_windows(SENTENCES, TOKENIZER, 5, 16, None)
    assert apart.equal(text.windows(SENTENCES, TOKENIZER, 5, 16, "packed")[0])
    whole = TOKENIZER("\n\n".join(SENTENCES))["input_ids"]
    for count in (5, None):
        one = text.perplexity_windows(SENTENCES, TOKENIZER, count, 16, "\n\n")
        assert one.flatten().tolist() == whole[: (count or len(whole) // 16) * 16]


@pytest.mark.parametrize("join", [None, "\n"])
@pytest.mark.parametrize(
    ("count", "message"),
    [
        (50, r"tasks.<name>.windows: 50 of 999 .*lower tasks.<name>.window as well"),
        (None, r"tasks.<name>.window: the data set has .* fewer than one window of 999; lower it"),
    ],
)
def test_too_little_text_to_judge_is_refused(join, count, message):
    with pytest.raises(Mistake, match=message):
        text.perplexity_windows(SENTENCES[:2], TOKENIZER, count, 999, join)


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_a_mixture_has_the_samples_of_each_text(layout):
    loud = [sentence.upper() for sentence in SENTENCES]
    ids, lengths = text.mixture([(SENTENCES, 3), (loud, 2)], TOKENIZER, 16, layout)
    for some, documents, rows in ((3, SENTENCES, slice(3)), (2, loud, slice(3, 5))):
        alone = text.windows(documents, TOKENIZER, some, 16, layout)
        assert ids[rows].equal(alone[0]) and lengths[rows].equal(alone[1])
    assert len(ids) == len(lengths) == 5


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_too_little_text_is_refused_with_what_there_is(layout):
    with pytest.raises(Mistake, match="samples: 50 of 16 .*lower it to"):
        text.windows(SENTENCES[:2], TOKENIZER, 50, 16, layout)


def test_a_missing_column_is_named(tmp_path):
    Dataset.from_dict({"passage": ["a"]}).save_to_disk(tmp_path)
    with pytest.raises(Mistake, match="passage"):
        text.texts(tmp_path, "text")


def test_blank_texts_are_skipped(tmp_path):
    Dataset.from_dict({"text": ["a", " ", "", None, "b"]}).save_to_disk(tmp_path)
    assert list(text.texts(tmp_path, "text")) == ["a", "b"]
    assert list(text.texts(tmp_path, "text", empty=True)) == ["a", " ", "", "", "b"]
