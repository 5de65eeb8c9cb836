"""NullTokenizer: numbers in, numbers out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError, DataError
from megatron.tokenizer.null import NullTokenizer


def test_end_of_document_follows_the_vocabulary() -> None:
    tokenizer = NullTokenizer(786)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (787, 786, None)
    assert tokenizer.files() == []


@given(st.lists(st.integers(0, 50)))
def test_round_trip(ids: list[int]) -> None:
    tokenizer = NullTokenizer(50)
    assert tokenizer.tokenize(tokenizer.detokenize(ids)) == ids
    assert tokenizer.pieces(ids) == [str(i) for i in ids]


@pytest.mark.parametrize(("text", "named"), [("1 x 2", "'x'"), ("1 2 51", "51"), ("-1", "-1"), ("1.5", "1.5")])
def test_text_that_is_no_ids(text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        NullTokenizer(50).tokenize(text)


def test_vocabulary_must_not_be_empty() -> None:
    with pytest.raises(ConfigError, match="--vocab-size"):
        NullTokenizer(0)
