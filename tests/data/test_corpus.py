"""What is read from which source, and what is said of sources that cannot be read."""

import gzip
import json
import sysconfig

import pytest

from mezzo.data.corpus import Document, ReadStats, documents, split_text
from mezzo.errors import DataError


def read(source, **options):
    stats = ReadStats()
    return [tuple(document) for document in documents(source, stats=stats, **options)], stats


def json_lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_a_folder_gives_one_document_for_each_file_sorted_by_name_at_any_depth(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.txt").write_text("three")
    found, stats = read(tmp_path)
    assert found == [("a.md", "one"), ("b/2.txt", "two"), ("c.txt", "three")]
    assert (stats.files, stats.documents, stats.bytes) == (3, 3, 11)


def test_chinese_in_gzip_and_json_lines_arrives_unchanged(tmp_path):
    text = "天地玄黄，宇宙洪荒。\n日月盈昃，辰宿列张。😀"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress((text + "二").encode()))
    (tmp_path / "c.jsonl").write_text(
        json_lines({"text": text + "三", "id": 1}, {"text": text + "四"}), encoding="utf-8"
    )
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": text + "五"}).encode()))
    found, _ = read(tmp_path)
    assert found == [
        ("a.txt", text),
        ("b.txt.gz", text + "二"),
        ("c.jsonl:1", text + "三"),
        ("c.jsonl:2", text + "四"),
        ("d.jsonl.gz:1", text + "五"),
    ]


def test_a_glob_chooses_files_and_another_text_key_is_honoured(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines({"content": "one"}))
    (tmp_path / "b.jsonl").write_text(json_lines({"content": "two"}))
    (tmp_path / "c.txt").write_text("three")
    found, _ = read(str(tmp_path / "*.jsonl"), text_key="content")
    assert [text for _, text in found] == ["one", "two"]


def test_the_same_text_twice_is_one_document(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines({"text": "same"}, {"text": "other"}, {"text": "same"}))
    (tmp_path / "b.txt").write_text("other")
    found, stats = read(tmp_path)
    assert [text for _, text in found] == ["same", "other"]
    assert stats.duplicates == 2


def test_hidden_files_empty_files_and_blank_lines_are_not_documents(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".secret").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n  \n{"text": " \\n"}\n')
    found, stats = read(tmp_path)
    assert found == [("a.jsonl:1", "one")]
    assert stats.empty == 2


def test_invalid_utf8_is_replaced_and_counted_exactly(tmp_path):
    # U+FFFD that the author wrote is not counted; a lone E4 before it is.
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd \xe4\xef\xbf\xbd and a long valid rest")
    (tmp_path / "b.txt").write_text("fine")
    found, stats = read(tmp_path)
    assert found[0][1] == "caf� � �� and a long valid rest"
    assert stats.invalid_utf8 == 2


def test_half_a_surrogate_pair_in_json_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud800 y \\ud83d\\ude00"}\n')
    found, stats = read(tmp_path / "a.jsonl")
    assert found == [("a.jsonl:1", "x � y 😀")]
    assert stats.invalid_utf8 == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    text = "word" if name == "a.txt" else '{"text": "word"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / name)[0][0][1] == "word"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x7fELF\x00\x01", r"a\.txt: binary \(it holds NUL bytes\)"),
        ("天地玄黄".encode("utf-16"), r"a\.txt: UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        (("天地玄黄宇宙洪荒" * 100).encode("gb18030"), r"a\.txt: not UTF-8 .* iconv -f GB18030"),
    ],
)
def test_a_file_that_is_not_text_is_an_error_if_named_and_skipped_in_a_folder(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match=says):
        read(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"no text found \(1 files read.*\n  skipped a\.txt: "):
        read(tmp_path)
    (tmp_path / "b.txt").write_text("good")
    found, stats = read(tmp_path)
    assert [text for _, text in found] == ["good"]
    assert len(stats.skipped) == 1
    assert stats.skipped[0].startswith("a.txt: ")


def test_a_nul_byte_far_into_a_large_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"words and words\n" * 80_000 + b"\0\n")
    with pytest.raises(DataError, match=r"a\.txt: binary"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "cut', r"a\.jsonl:2: not JSON \(Unterminated string"),
        ('{"txt": "x"}', r"a\.jsonl:2: no text under 'text', its keys are \['txt'\]; .* data\.text_key"),
        ('{"text": 5}', r"a\.jsonl:2: no text under 'text', its keys are \['text'\]"),
        ("[1]", r"a\.jsonl:2: no text under 'text', it is a list"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        read(tmp_path)


def test_a_truncated_gzip_file_is_an_error_even_in_a_folder(tmp_path):
    whole = gzip.compress(b"some words " * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text("fine")
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged gzip file"):
        read(tmp_path)
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged gzip file"):
        read(tmp_path)


def test_sources_without_text_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r'no such file or folder; data is a file, a folder, a glob or "stdlib"'):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="the folder holds no files; put text"):
        read(tmp_path)
    with pytest.raises(DataError, match="the pattern matches no file"):
        read(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"no text found \(1 files read, .* name a file with UTF-8 text"):
        read(tmp_path / "a.txt")


def test_the_standard_library_is_text_on_every_machine_without_its_tests():
    found, stats = read("stdlib")
    names = [name for name, _ in found]
    assert "typing.py" in names
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert stats.bytes > 5_000_000


def test_a_stripped_standard_library_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("pass\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"stdlib: only 5 bytes .* at least 2,000,000 .* another build of Python"):
        read("stdlib")


def test_one_large_file_becomes_pieces_that_end_at_blank_lines(tmp_path):
    verses = [f"verse {i}\n" + "line of words\n" * 20 + "\n" for i in range(2000)]
    (tmp_path / "a.txt").write_text("".join(verses))
    found, _ = read(tmp_path / "a.txt")
    assert "".join(text for _, text in found) == "".join(verses)
    assert [name for name, _ in found][:2] == ["a.txt#0", "a.txt#1"]
    assert all(text.startswith("verse") and text.endswith("\n\n") for _, text in found)
    assert all(16_384 <= len(text) < 17_000 for _, text in found[:-1])


def test_a_character_that_lies_across_two_reads_is_not_broken(tmp_path):
    text = "x" + ("天地玄黄" * 10 + "\n") * 10_000  # 121 bytes a line: byte 2**20 is inside a character
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found, stats = read(tmp_path / "a.txt")
    assert stats.invalid_utf8 == 0
    assert stats.duplicates + stats.documents > 10
    assert set("".join(piece for _, piece in found)) == set("x天地玄黄\n")


def test_gzip_and_plain_text_are_cut_alike(tmp_path):
    text = "".join(f"paragraph {i}\n\n" for i in range(100_000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = read(tmp_path / "a.txt")[0], read(tmp_path / "b.txt.gz")[0]
    assert [text for _, text in plain] == [text for _, text in packed]


def test_a_small_file_is_cut_into_smaller_pieces_so_that_both_splits_have_some(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"word {i}\n\n" for i in range(400)))
    assert len(read(tmp_path / "a.txt")[0]) == 4


@pytest.mark.parametrize("text", ["天地玄黄" * 5000, "a line of text\n" * 2000, "x\n\n" * 5000, "", "short"])
def test_cutting_loses_nothing_and_does_not_depend_on_how_the_text_arrives(text):
    whole = list(split_text(iter([text]), size=1000))
    assert "".join(whole) == text
    assert all(0 < len(piece) <= 2000 for piece in whole)
    for width in (1, 7, 1500):
        parts = (text[i : i + width] for i in range(0, len(text), width))
        assert list(split_text(parts, size=1000)) == whole


def test_a_document_has_a_name_and_a_text():
    assert Document("a", "b")._asdict() == {"name": "a", "text": "b"}
