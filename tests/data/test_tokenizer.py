"""Any text to ids and back; special names in a text are text; characters never come in halves."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from mezzo.data.tokenizer import Tokenizer, _byte_alphabet
from mezzo.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat\n" * 20, "天地玄黄，宇宙洪荒。" * 20, "def f(x):\n    return x + 1\n" * 20]
TOKENIZER = Tokenizer.train(TEXTS, 400)


def foreign(**options):
    """A tokenizer as Llama 2 has it: pieces with ▁ for a space, single bytes as <0x..>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {token: 259 + i for i, token in enumerate(["▁", "a", "b", "▁a", "ab", "▁ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(options.get("special", ["<s>", "</s>"]))
    return inner


@settings(deadline=None)  # a shared machine may be slow for a moment
@given(st.text())
def test_any_text_survives_encode_and_decode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "中文，测试。", "👩‍👩‍👧‍👦 é e\u0301", "\x00\r\n\t", "a" * 10_000, "<|endoftext|>", "\u202e\ufeff"]
)
def test_awkward_texts_survive_too(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_ids_are_int64_below_the_vocabulary_size_and_common_words_are_short():
    ids = TOKENIZER.encode("the cat sat")
    assert ids.dtype == np.int64
    assert len(ids) < len("the cat sat")
    assert TOKENIZER.vocab_size <= 400
    assert ids.max() < TOKENIZER.vocab_size


def test_training_twice_gives_the_same_tokenizer():
    assert Tokenizer.train(iter(TEXTS), 400).to_json() == TOKENIZER.to_json()


def test_the_end_token_typed_in_a_text_is_text():
    ids = TOKENIZER.encode("a<|endoftext|>b")
    assert TOKENIZER.eot not in ids
    assert TOKENIZER.decode(ids) == "a<|endoftext|>b"
    assert TOKENIZER.decode([*ids, TOKENIZER.eot]) == "a<|endoftext|>b"


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "the cat 天地 <|endoftext|>"
    assert (again.encode(text) == TOKENIZER.encode(text)).all()
    assert (again.eot, again.vocab_size) == (TOKENIZER.eot, TOKENIZER.vocab_size)
    assert again.to_json() == TOKENIZER.to_json()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size 256 is too small: byte-level BPE needs 257"):
        Tokenizer.train(TEXTS, 256)
    assert Tokenizer.train(TEXTS, 257).vocab_size == 257


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"character 2 is half of a surrogate pair \(U\+D800\)"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 400])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(DataError, match=f"token id {token} is outside the tokenizer's 0 … "):
        TOKENIZER.decode([token])
    with pytest.raises(DataError, match=f"token id {token} is outside"):
        TOKENIZER.stream().push(token)


@settings(deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_a_stream_gives_what_decoding_all_at_once_gives_for_any_ids(ids):
    stream = TOKENIZER.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOKENIZER.decode(ids)


@settings(deadline=None)
@given(st.text())
def test_a_stream_of_a_text_never_shows_a_character_that_is_not_in_it(text):
    stream = TOKENIZER.stream()
    shown = ""
    for token in TOKENIZER.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_an_unfinished_character_comes_out_as_one_replacement_at_the_end():
    ids = TOKENIZER.encode("😀")
    assert len(ids) == 4
    stream = TOKENIZER.stream()
    assert [stream.push(token) for token in ids[:3]] == ["", "", ""]
    assert stream.flush() == "�"


def test_byte_lengths_add_up_to_the_bytes_of_the_text():
    lengths = TOKENIZER.byte_lengths()
    text = "the cat 天地 😀 <|endoftext|>"
    assert lengths is not None
    assert lengths[TOKENIZER.encode(text)].sum() == len(text.encode())
    assert lengths[TOKENIZER.eot] == 0


def test_the_byte_alphabet_is_that_of_tokenizers():
    assert sorted(_byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_alphabet().values()) == list(range(256))


def test_a_tokenizer_made_elsewhere_is_used_without_its_padding_cutting_and_start_token(tmp_path):
    inner = foreign()
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.eot_token == "</s>"
    assert tokenizer.eot == 2
    assert tokenizer.encode("ab ab ab").tolist() == [264, 264, 264]
    assert tokenizer.byte_lengths() is None


@pytest.mark.parametrize("text", ["ab a b", "天ab 😀b", "a" * 300 + "天 ab" * 100])
def test_a_stream_works_for_tokenizers_that_are_not_byte_level(text):
    tokenizer = Tokenizer(foreign())
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert not any("�" in part for part in parts)
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids) == text


def test_a_tokenizer_without_an_end_token_says_which_it_looked_for():
    vocab = {"<unk>": 0, "a": 1}
    with pytest.raises(DataError, match=r"no token that ends a document; looked for <\|endoftext\|>, .*</s>"):
        Tokenizer(tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>")))


def test_ids_with_gaps_count_up_to_the_highest():
    vocab = {"a": 0, "</s>": 9}
    assert Tokenizer(tokenizers.Tokenizer(models.BPE(vocab, []))).vocab_size == 10


@pytest.mark.parametrize("content", ["", "{}", "not json", json.dumps({"model": 5})])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=r"t\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        Tokenizer.load(tmp_path / "absent.json")
