"""Shards on disk: what is in them, who is in which split, and what happens when they are damaged."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mezzo.data import shards
from mezzo.data.corpus import documents
from mezzo.data.shards import Corpus, prepare
from mezzo.data.tokenizer import Tokenizer
from mezzo.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path):
    """Sixty documents in three languages."""
    lines = [
        json.dumps(
            {"text": f"Document {i}: the quick brown fox. 第{i}章 天地玄黄。 Größe {i}.\n" * 5}, ensure_ascii=False
        )
        for i in range(60)
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def corpus(source, tmp_path):
    return prepare(source, tmp_path / "cache", vocab_size=400, valid_fraction=0.2)


def texts(corpus, tokens):
    """The documents of a split, decoded."""
    ids = tokens.read(0, len(tokens))
    assert ids[-1] == corpus.tokenizer.eot
    ends = np.flatnonzero(ids == corpus.tokenizer.eot)
    return [corpus.tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


def test_every_document_is_whole_in_exactly_one_split_and_in_order(corpus, source):
    train, valid = texts(corpus, corpus.train), texts(corpus, corpus.valid)
    everything = [document.text for document in documents(source)]
    assert not set(train) & set(valid)
    assert [text for text in everything if text in set(train)] == train
    assert [text for text in everything if text in set(valid)] == valid
    assert len(train) + len(valid) == 60
    # A binomial share of 60 documents at 0.2: 12 expected, standard deviation 3.1; four of them.
    assert 1 <= len(valid) <= 24


def test_the_manifest_tells_the_truth(corpus, source):
    manifest = corpus.manifest
    whole = hashlib.sha256()
    for document in documents(source):
        whole.update(len(document.text.encode()).to_bytes(8, "little") + document.text.encode())
    assert corpus.sha256 == manifest["sha256"] == whole.hexdigest()
    for split, tokens in (("train", corpus.train), ("valid", corpus.valid)):
        held = texts(corpus, tokens)
        assert manifest["splits"][split] == {
            "tokens": len(tokens),
            "documents": len(held),
            "bytes": sum(len(text.encode()) for text in held),
        }
    for name, entry in manifest["files"].items():
        raw = (corpus.folder / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert {path.name for path in corpus.folder.iterdir()} == {*manifest["files"], "manifest.json"}
    assert set(manifest["versions"]) == {"mezzo", "tokenizers", "python"}


def test_tokens_are_mapped_from_disk_in_16_bits(corpus):
    (shard,) = corpus.train.shards
    assert isinstance(shard, np.memmap)
    assert shard.dtype == np.dtype("<u2")


def test_a_vocabulary_above_65536_takes_32_bits(tmp_path, source):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"</s>": 70_000}
    inner = tokenizers.Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.save(str(tmp_path / "big.json"))
    corpus = prepare(source, tmp_path / "cache", vocab_size=1, tokenizer_path=tmp_path / "big.json")
    assert corpus.train.shards[0].dtype == np.dtype("<u4")
    assert len(texts(corpus, corpus.train)) + len(texts(corpus, corpus.valid)) == 60


def test_the_tokenizer_never_sees_validation_text(corpus, source, monkeypatch, tmp_path):
    seen: list[str] = []
    train = Tokenizer.train

    def spy(given, vocab_size):
        seen.extend(given)
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    prepare(source, tmp_path / "other", vocab_size=400, valid_fraction=0.2)
    assert seen == texts(corpus, corpus.train)


def test_the_tokenizer_learns_from_a_part_of_very_much_text(source, monkeypatch, tmp_path):
    seen: list[str] = []
    train = Tokenizer.train

    def spy(given, vocab_size):
        seen.extend(given)
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    monkeypatch.setattr(shards, "TRAINING_BYTES", 5_000)
    prepare(source, tmp_path / "cache", vocab_size=300)
    assert 0 < len(seen) < 50


def test_the_same_text_is_prepared_once(corpus, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_write", lambda *args: pytest.fail("prepared again"))
    again = prepare(source, tmp_path / "cache", vocab_size=400, valid_fraction=0.2)
    assert again.folder == corpus.folder


def test_other_text_or_other_settings_are_another_folder(corpus, source, tmp_path):
    cache = tmp_path / "cache"
    corpus.tokenizer.save(tmp_path / "t.json")
    folders = {
        corpus.folder,
        prepare(source, cache, vocab_size=401, valid_fraction=0.2).folder,
        prepare(source, cache, vocab_size=400, valid_fraction=0.3).folder,
        prepare(source, cache, vocab_size=400, valid_fraction=0.2, tokenizer_path=tmp_path / "t.json").folder,
    }
    source.write_text(source.read_text(encoding="utf-8") + '\n{"text": "one more"}', encoding="utf-8")
    folders.add(prepare(source, cache, vocab_size=400, valid_fraction=0.2).folder)
    assert len(folders) == 5


def test_preparing_elsewhere_gives_the_same_bytes(corpus, source, tmp_path):
    other = prepare(source, tmp_path / "elsewhere", vocab_size=400, valid_fraction=0.2)
    assert other.folder.name == corpus.folder.name
    for name in corpus.manifest["files"]:
        assert (other.folder / name).read_bytes() == (corpus.folder / name).read_bytes()


def test_a_split_may_lie_in_several_shards(source, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    many = prepare(source, tmp_path / "other", vocab_size=400, valid_fraction=0.2)
    assert len(many.train.shards) > 10
    assert {len(shard) for shard in many.train.shards[:-1]} == {100}
    assert (many.train.read(0, len(many.train)) == corpus.train.read(0, len(corpus.train))).all()
    assert (many.train.read(95, 210) == corpus.train.read(95, 210)).all()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_splits_have_a_document_even_if_the_share_says_none(source, tmp_path, fraction):
    corpus = prepare(source, tmp_path / "cache", vocab_size=300, valid_fraction=fraction)
    assert min(len(texts(corpus, corpus.train)), len(texts(corpus, corpus.valid))) == 1


def test_a_single_document_cannot_be_split_and_the_error_says_what_can(tmp_path):
    (tmp_path / "a.txt").write_text("only one short text")
    with pytest.raises(DataError, match=r"the text is a single document, .* give more text: several files"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", vocab_size=300)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_a_share_that_is_none_is_refused(source, tmp_path, fraction):
    with pytest.raises(ConfigError, match="is not a share; give a number between 0 and 1"):
        prepare(source, tmp_path / "cache", vocab_size=300, valid_fraction=fraction)


def flip(path: Path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin", "tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "says"), [(flip, "its contents changed"), (cut, "bytes, the manifest says"), (Path.unlink, "missing")]
)
def test_a_damaged_file_is_named_and_made_again_from_the_text(corpus, source, tmp_path, name, damage, says):
    path = corpus.folder / name
    good = path.read_bytes()
    damage(path)
    with pytest.raises(DataError, match=rf"{name}: .*{says}.*; prepare the text again"):
        Corpus.open(corpus.folder, verify=True)
    heard: list[str] = []
    prepare(
        source,
        tmp_path / "cache",
        vocab_size=400,
        valid_fraction=0.2,
        progress=lambda stage, share: heard.append(stage),
    )
    assert path.read_bytes() == good
    assert [stage for stage in heard if "making the shards again" in stage and name in stage]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": {}, "dtype": "<u2"}', '{"files": 3}'])
def test_a_damaged_manifest_is_named(corpus, content):
    (corpus.folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: missing or damaged"):
        Corpus.open(corpus.folder)


def test_a_process_killed_while_writing_leaves_nothing_that_is_taken_for_a_corpus(source, tmp_path):
    script = (
        "import os, sys\n"
        "from mezzo.data import shards\n"
        "shards._sync_folder = lambda folder: os._exit(9)\n"  # all written, not yet renamed
        "shards.prepare(sys.argv[1], sys.argv[2], vocab_size=300)\n"
    )
    cache = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", script, str(source), str(cache)], check=False)
    assert done.returncode == 9
    assert [path.name[:5] for path in cache.iterdir() if path.is_dir()] == [".tmp-"]
    corpus = prepare(source, cache, vocab_size=300)
    assert [path for path in cache.iterdir() if path.is_dir()] == [corpus.folder]


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_sync", full)
    with pytest.raises(DataError, match=r"cannot write token shards \(No space left on device\); about .* make room"):
        prepare(source, tmp_path / "cache", vocab_size=300)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_text_that_changes_while_it_is_read_is_an_error(source, tmp_path):
    def meddle(stage, share):
        if stage == "training the tokenizer" and share == 0:
            source.write_text('{"text": "quite another text"}\n{"text": "and one more"}\n')

    with pytest.raises(DataError, match="the text changed while it was read"):
        prepare(source, tmp_path / "cache", vocab_size=300, progress=meddle)


def test_two_at_once_do_the_work_once(source, tmp_path, monkeypatch):
    write, calls = shards._write, []
    monkeypatch.setattr(shards, "_write", lambda *args: (calls.append(1), write(*args)))
    threads = [
        threading.Thread(target=prepare, args=(source, tmp_path / "cache"), kwargs={"vocab_size": 300})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_invalid_utf8_and_skipped_files_are_in_the_manifest(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"caf\xe9 and a longer rest of text")
    (folder / "b.txt").write_text("another")
    (folder / "c.png").write_bytes(b"\x89PNG\0\0")
    manifest = prepare(folder, tmp_path / "cache", vocab_size=300).manifest
    assert manifest["invalid_utf8"] == 1
    assert [line.split(":")[0] for line in manifest["skipped"]] == ["c.png"]


def test_progress_goes_through_the_stages_to_the_end(source, tmp_path):
    heard: list[tuple[str, float]] = []
    prepare(source, tmp_path / "cache", vocab_size=300, progress=lambda stage, share: heard.append((stage, share)))
    stages = list(dict.fromkeys(stage for stage, _ in heard))
    assert stages == ["reading text", "training the tokenizer", "encoding"]
    assert heard[-1] == ("encoding", 1.0)
    assert all(0 <= share <= 1 for _, share in heard)
