"""Reading documents: every format, and every bad input named by file and line."""

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_fixtures import make_texts, write_jsonl

from elo.data import compressed, json_lines, sources
from elo.data.json_lines import read_json_lines
from elo.data.sources import TEXT_LIMIT, FileReader, InputFile, list_inputs, read_documents
from elo.errors import EloError

TEXTS = make_texts(25)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, columns: dict[str, list], rows: int = 10) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def write_formats(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    data = lines(TEXTS)
    files = {
        "a.jsonl": data,
        "b.jsonl.gz": gzip.compress(data[:500]) + gzip.compress(data[500:]),
        "c.jsonl.zst": zstandard.compress(data[:500]) + zstandard.compress(data[500:]),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_parquet(folder / "d.parquet", {"id": list(range(25)), "text": TEXTS})
    return {file.name: file for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_every_format_gives_the_same_documents_and_can_be_entered_anywhere(tmp_path: Path, name: str) -> None:
    path = write_formats(tmp_path)[name]
    assert list(read_documents(path)) == TEXTS
    (file,) = list_inputs(str(path))
    everything = list(FileReader(file).records())
    assert [record.line for record in everything] == list(range(1, 26))
    for start in (0, 1, 9, 10, 11, 24, 25):
        reader = FileReader(file)
        assert list(reader.records(start)) == everything[start:]
        assert reader.bytes_read == path.stat().st_size


def test_plain_text_is_one_document_a_file_and_large_ones_are_cut_without_losing_a_byte(tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("첫 줄\n\nsecond paragraph\n", encoding="utf-8")
    assert list(read_documents(small)) == ["첫 줄\n\nsecond paragraph"]
    with gzip.open(tmp_path / "small.txt.gz", "wb") as file:
        file.write(small.read_bytes())
    assert list(read_documents(tmp_path / "small.txt.gz")) == ["첫 줄\n\nsecond paragraph"]

    large = tmp_path / "large.txt"
    paragraph = "한 문단이 여기 있다. " * 500
    large.write_text("\n\n".join([paragraph] * 60), encoding="utf-8")
    documents = list(read_documents(large))
    assert len(documents) > 2
    assert "".join(documents).replace("\n", "") == large.read_text(encoding="utf-8").replace("\n", "")
    assert all(document.endswith(paragraph) for document in documents)

    one_line = tmp_path / "one_line.txt"
    one_line.write_text("가나다 " * (TEXT_LIMIT // 4), encoding="utf-8")
    documents = list(read_documents(one_line))
    assert len(documents) > 1 and "".join(documents) == one_line.read_text(encoding="utf-8")
    (found,) = list_inputs(str(one_line))
    assert list(FileReader(found).records(1)) == list(FileReader(found).records())[1:]


def test_folders_and_globs_are_listed_in_order_without_hidden_or_unknown_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.txt", "notes.md", ".hidden.jsonl", ".git/x.jsonl", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [Path(f.location).name for f in list_inputs(str(tmp_path))] == ["a.txt", "10.jsonl", "2.jsonl"]
    assert not caplog.text
    for name in ("b/3.jsonl.bz2", "c.JSONL"):  # a part of the corpus that would be missed
        (tmp_path / name).write_text("x")
    for _ in range(2):
        assert [Path(f.location).name for f in list_inputs(str(tmp_path))] == ["a.txt", "10.jsonl", "2.jsonl"]
    assert caplog.text.count("2 files are not read") == 1 and "3.jsonl.bz2" in caplog.text
    assert [Path(f.location).name for f in list_inputs(f"{tmp_path}/**/*.jsonl")] == ["10.jsonl", "2.jsonl"]
    odd = tmp_path / "odd[1].jsonl"
    odd.write_text('{"text": "x"}\n')
    assert [f.location for f in list_inputs(str(odd))] == [str(odd)]


BAD_LINES = {
    "broken": (b'{"text": "cut', "not valid JSON"),
    "array": (b'["text"]', "a JSON array, not an object"),
    "string": (b'"text"', "a JSON string, not an object"),
    "number": (b"12", "a JSON number, not an object"),
    "null": (b"null", "a JSON null, not an object"),
    "no column": (b'{"id": 1, "body": "x"}', "no column 'text'; the columns are 'id', 'body'; set text_column"),
    "null text": (b'{"text": null}', "column 'text' is null, not text"),
    "number text": (b'{"text": 12}', "column 'text' is number, not text: '12'"),
    "list text": (b'{"text": ["a"]}', "column 'text' is array, not text"),
    "latin-1": ('{"text": "café"}'.encode("latin-1"), "not UTF-8 (byte 0xe9 at byte 14 of the line)"),
    "surrogate": (b'{"text": "a\\ud800b"}', "half of a surrogate pair"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not valid JSON (Extra data"),
    "deep": (b'{"text": ' + b"[" * 100_000, "not valid JSON"),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}", "column 'text' is number, not text"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path: Path, kind: str) -> None:
    bad, said = BAD_LINES[kind]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines(TEXTS[:2]) + bad + b"\n" + lines(TEXTS[2:3]))
    with pytest.raises(EloError) as caught:
        list(read_documents(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)
    assert list(read_documents(path, on_error="skip")) == TEXTS[:3]


def test_a_whole_surrogate_pair_a_byte_order_mark_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "fine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d\\ude00"}\r\n\n  \n{"text": ""}\n{"text": " \\n"}\n{"text": "end"}')
    assert list(read_documents(path)) == ["😀", "end"]
    text = tmp_path / "fine.txt"
    text.write_bytes(b"\xef\xbb\xbfhello\n")
    assert list(read_documents(text)) == ["hello"]


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    data = lines(TEXTS)
    files = {
        "empty.jsonl": (b"", ":1: the file is empty"),
        "blank.jsonl": (b"\n \n", ":1: the file has no document"),
        "blank.txt": (b"\n\n", ":1: the file has no document"),
        "short.jsonl.gz": (gzip.compress(data)[:-20], ": the file is damaged from here on: it is truncated"),
        "not.jsonl.gz": (data, ":1: the file is not compressed with gzip"),
        "flip.jsonl.gz": (gzip.compress(data)[:-8] + b"\0" * 8, ": the file is damaged from here on (CRC"),
        "short.jsonl.zst": (zstandard.compress(data)[:-20], ": the file is damaged from here on"),
        "not.jsonl.zst": (data, ":1: the file is not compressed with Zstandard"),
        "not.parquet": (data, ":1: the file is not a parquet file"),
        "latin.txt": ("eins\nzwei\nschön\n".encode("latin-1"), ":3: not UTF-8 (byte 0xf6 at byte 4 of the line)"),
        "utf16.jsonl": (data.decode().encode("utf-16"), ":1: the file is not UTF-8 but UTF-16"),
    }
    found = {}
    for name, (content, said) in files.items():
        (folder / name).write_bytes(content)
        found[name] = (folder / name, said)
    whole = write_parquet(folder / "whole.parquet", {"text": TEXTS * 100})
    short = folder / "short.parquet"
    short.write_bytes(whole.read_bytes()[:-100])
    holes = bytearray(whole.read_bytes())
    holes[40:200] = b"\xff" * 160
    (folder / "holes.parquet").write_bytes(holes)
    found["short.parquet"] = (short, ":1: the file is damaged from here on")
    found["holes.parquet"] = (folder / "holes.parquet", ":1: the file is damaged from here on")
    column = write_parquet(folder / "column.parquet", {"body": TEXTS, "id": TEXTS})
    found["column.parquet"] = (column, ":1: no column 'text'; the columns are 'body', 'id'; set text_column")
    null = write_parquet(folder / "null.parquet", {"text": [*TEXTS[:12], None]})
    found["null.parquet"] = (null, ":13: column 'text' is null, not text")
    number = write_parquet(folder / "number.parquet", {"text": [1, 2]})
    found["number.parquet"] = (number, ":1: column 'text' is number, not text: '1'")
    none = write_parquet(folder / "none.parquet", {"text": pyarrow.array([], pyarrow.string())})
    found["none.parquet"] = (none, ":1: the file has no document")
    return found


LOST_WHOLE = (
    "utf16.jsonl",
    "not.jsonl.gz",
    "not.jsonl.zst",
    "short.jsonl.zst",
    "not.parquet",
    "short.parquet",
    "holes.parquet",
    "column.parquet",
    "latin.txt",
    "number.parquet",
)


def test_damaged_files_are_named_and_skipped(tmp_path: Path) -> None:
    cases = damaged_files(tmp_path)
    assert len(cases) == 17
    for name, (path, said) in cases.items():
        with pytest.raises(EloError) as caught:
            list(read_documents(path))
        assert str(caught.value).startswith(str(path)) and said in str(caught.value), (name, str(caught.value))
        if name in LOST_WHOLE:  # what skips documents does not skip a file
            with pytest.raises(EloError, match=re.escape(said)):
                list(read_documents(path, on_error="skip"))
            continue
        skipped = list(read_documents(path, on_error="skip"))
        assert skipped or not name.endswith(".gz"), "what comes before the damage is read"
        assert skipped == (TEXTS * 100)[: len(skipped)], name


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "data.csv").write_text("a")
    (tmp_path / "folder.d").mkdir()
    for path, said in {
        f"{tmp_path}/none.jsonl": "no such file or folder",
        f"{tmp_path}/*.jsonl": "the pattern matches no file",
        f"{tmp_path}/folder*": "the pattern matches only folders",
        f"{tmp_path}/empty": "the folder has no readable file; add files named .jsonl",
        f"{tmp_path}/data.json": "unknown file type '.json'; use .jsonl",
        f"{tmp_path}/data.csv": "unknown file type '.csv'",
        "owner/name.jsonl": "no such file or folder",
    }.items():
        with pytest.raises(EloError) as caught:
            list_inputs(path)
        assert str(caught.value).startswith(path) and said in str(caught.value)


def test_a_dataset_is_read_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS)
    write_jsonl(folder / "test.jsonl", TEXTS[:3])
    assert list(read_documents(f"hf://{folder}")) == TEXTS
    assert list(read_documents(f"hf://{folder}:test")) == TEXTS[:3]
    assert list(read_documents(f"hf://{folder}:default:test")) == TEXTS[:3]
    (file,) = list_inputs(f"hf://{folder}")
    assert [record.text.decode() for record in FileReader(file).records(20)] == TEXTS[20:]
    with pytest.raises(EloError, match=r"set:1: no column 'body'; the columns are 'text'"):
        list(read_documents(f"hf://{folder}", "body"))
    with pytest.raises(EloError, match="the Hugging Face dataset cannot be read at row 1"):
        list(read_documents(f"hf://{tmp_path}/nothing"))
    with pytest.raises(EloError, match="not a dataset id"):
        list(read_documents("hf://a:b:c:d"))
    assert list_inputs("owner/name")[0].location == "hf://owner/name"


def zstd(window_log: int, data: bytes) -> bytes:
    """As `zstd --long` writes it; streamed, so that the window is not reduced to the size of the content."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstandard_files_of_large_windows_are_read(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zstd(window_log, lines(TEXTS)))
    assert zstandard.get_frame_parameters(path.read_bytes()[:32]).window_size == 1 << window_log
    assert list(read_documents(path)) == TEXTS


def refusal(path: Path, **options: str) -> str:
    with pytest.raises(EloError) as caught:
        list(read_documents(path, **options))
    return str(caught.value)


def test_a_limit_is_no_damage_and_no_file_is_one_skipped_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zstd(28, lines(TEXTS)))
    monkeypatch.setattr(compressed, "MAX_WINDOW", 1 << 27)
    for on_error in ("stop", "skip"):
        said = refusal(path, on_error=on_error)
        assert said.startswith(f"{path}:1: the file is compressed with a window of more than 128 MiB")
        assert "damaged" not in said
    dictionary = zstandard.train_dictionary(2000, [text.encode() for text in make_texts(2000)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(lines(TEXTS)))
    assert "decompress it with that dictionary" in refusal(path)

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    table = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    with monkeypatch.context() as patched:
        patched.setattr(pyarrow.parquet, "ParquetFile", no_memory)
        assert "there is not enough memory" in refusal(table)
    table.unlink()
    table.mkdir()  # what the system refuses names the system's reason
    file = InputFile(str(table), 1)
    (record,) = FileReader(file).records()
    assert record.problem == f"{table}:1: the file cannot be read (Is a directory); " + (
        "check its permissions and the disk, then run again"
    )


def test_what_comes_before_damage_is_kept_and_the_file_is_named(tmp_path: Path) -> None:
    texts = make_texts(3000)
    whole = gzip.compress(lines(texts))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    kept = list(read_documents(path, on_error="skip"))
    assert 1000 < len(kept) < 2000 and kept == texts[: len(kept)]
    *_, last = FileReader(list_inputs(str(path))[0]).records()
    assert last.ends_file and not last.loses_file and last.number == len(kept)


@pytest.mark.parametrize(
    "end",
    [
        '{"text": "ab',
        '{"text": "강',
        '{"text": "ab"',
        '{"text"',
        "{",
        '{"a": tru',
        '{"text": "a\\u00',
        '{"a": -',
        '{"a": 1,',
    ],
)
def test_a_cut_last_line_is_called_that(tmp_path: Path, end: str) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(lines(TEXTS[:2]) + end.encode())
    said = refusal(path)
    assert said.startswith(f"{path}:3: not valid JSON: the last line is cut off after")
    path.write_bytes(lines(TEXTS[:2]) + end.encode() + b"\n")
    assert "is cut off after" not in refusal(path)


def test_a_last_line_cut_within_a_character_is_called_that_and_other_faults_are_not(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(lines(TEXTS[:2]) + '{"text": "강'.encode()[:-1])
    assert "the last line is cut" in refusal(path)
    for wrong in (b"hello", b"{'text': 'a'}", b'{"text": "a} ', b'{"a": nil}', '{"text": "é"}'.encode("latin-1")):
        path.write_bytes(lines(TEXTS[:2]) + wrong)
        assert "the last line is cut" not in refusal(path)


def bomb(blocks: int) -> bytes:
    """A Zstandard frame of blocks of four bytes, each a space 128 Ki times."""
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"\x02\x00\x10 " * blocks


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda path: list(read_documents(path)), ":2: the line is longer than 4 MiB; write one document per line"),
        (lambda path: read_json_lines(path, "items"), ": line 2 is longer than 4 MiB; write one JSON value per line"),
    ],
    ids=["corpus", "small file"],
)
def test_a_line_of_gigabytes_in_kilobytes_is_named_within_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any], said: str
) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.compress(lines(TEXTS[:1])) + bomb(8000))
    for module in (sources, json_lines):
        monkeypatch.setattr(module, "LINE_LIMIT", 1 << 22)
    tracemalloc.start()
    try:
        with pytest.raises(EloError, match=said):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_long_integers_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": ' + b"9" * 5000 + b', "text": "one"}\n{"text": "two"}\n')
    assert list(read_documents(path)) == ["one", "two"]
    monkeypatch.setattr(sources, "LINE_LIMIT", 1 << 10)
    path.write_bytes(lines(["first", "x" * 5000, "last"]))
    assert f"{path}:2: the line is longer than" in refusal(path)
    assert list(read_documents(path, on_error="skip")) == ["first", "last"]
    assert [record.line for record in FileReader(list_inputs(str(path))[0]).records()] == [1, 2, 3]


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())]
)
def test_binary_columns_of_parquet_are_read_as_utf8(tmp_path: Path, kind: pyarrow.DataType) -> None:
    data = [text.encode() for text in TEXTS]
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(data, pyarrow.binary()).cast(kind)})
    assert list(read_documents(path)) == TEXTS
    write_parquet(path, {"text": pyarrow.array([*data[:2], b"\xff\xfe"], pyarrow.binary())})
    assert f"{path}:3: column 'text' is binary and not UTF-8 (byte 0xff at byte 1 of the value)" in refusal(path)


def test_paths_that_look_local_are_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl", TEXTS[:1])
    for path, said in {
        "mine/trian.jsonl": "mine/trian.jsonl: no such file or folder (did you mean mine/train.jsonl?)",
        "mine/train": "(did you mean mine/train.jsonl?); check the path; for a Hugging Face dataset write hf://mine/train",
        "data/train": "(there is no folder data); check the path; for a Hugging Face dataset write hf://data/train",
        "corpus": "corpus: no such file or folder; check the path",
    }.items():
        with pytest.raises(EloError, match=re.escape(said)):
            list_inputs(path)
    assert list_inputs("hf://data/train")[0].location == "hf://data/train"


def test_a_dataset_that_cannot_be_reached_is_answered_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def refuse(self: object, name: str, **options: object) -> None:
        asked.append((name, options["timeout"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EloError, match=r"hf://owner/name: .*no network.*there is no such local file or folder"):
        list(read_documents("owner/name"))
    assert asked == [("owner/name", sources.HUB_TIMEOUT_S)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_a_file_of_another_kind_than_its_name_is_called_that(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = lines(TEXTS)
    contents = {
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
        "compressed with gzip; add .gz": gzip.compress(data),
        "compressed with Zstandard; add .zst": zstandard.compress(data),
        "a zip archive": b"PK\x03\x04" + data,
        "UTF-16": data.decode().encode("utf-16"),
    }
    for kind, content in contents.items():
        path.write_bytes(content)
        if kind.split(" ")[2:3] == [{".gz": "gzip;", ".zst": "Zstandard;"}.get(path.suffix)]:
            assert list(read_documents(path)) == TEXTS
        elif not (kind == "a web page" and name == "a.txt"):
            for on_error in ("stop", "skip"):
                assert kind in refusal(path, on_error=on_error)


GOOD_LINES = lines(TEXTS[:3])
_ARRAY = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
WHOLE_FILES: dict[str, tuple[str, bytes, str]] = {
    "array": ("a.jsonl", b"[" + GOOD_LINES.replace(b"}\n", b"},\n") + b"]", r"a\.jsonl:1: .*JSON array.*jq"),
    "indented array": ("a.jsonl", _ARRAY, r"a\.jsonl:1: .*JSON array"),
    "indented object": ("a.jsonl", b'{\n "text": "a"\n}\n', "spread over several lines"),
    "CR alone": ("a.jsonl", GOOD_LINES.replace(b"\n", b"\r"), "end in CR alone"),
    "other column": ("a.jsonl", b'{"body": "a"}\n' * 3, "no column 'text'; the columns are 'body'"),
    "inside another column": ("a.jsonl", b'{"doc": {"text": "a"}}\n' * 3, "column 'doc' has one inside"),
    "another encoding": ("a.txt", "안녕하세요 여러분".encode("cp949"), "not UTF-8"),
    "UTF-16 without mark": ("a.jsonl", GOOD_LINES.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-32": ("a.jsonl", GOOD_LINES.decode().encode("utf-32"), "iconv -f UTF-32"),
    "no gzip": ("a.jsonl.gz", GOOD_LINES, "not compressed with gzip; .* remove .gz"),
    "lz4": ("a.jsonl.zst", b"\x04\x22\x4d\x18" + b"x" * 30, "compressed with LZ4; decompress it"),
    "arrow": ("a.parquet", b"ARROW1\0\0" + b"\0" * 30, "an Arrow file; write it as parquet"),
    "gzip twice": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD_LINES)), "once decompressed, .* with gzip; unpack"),
    "xz in zst": ("a.txt.zst", zstandard.compress(b"\xfd7zXZ\0" + GOOD_LINES), "once decompressed, .* with xz; unpack"),
    "page in gzip": ("a.jsonl.gz", gzip.compress(b"<html>Too many requests</html>"), "once decompressed, .* web page"),
    "XML": ("a.jsonl", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML page"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_without_a_readable_document_is_never_skipped(name: str, tmp_path: Path) -> None:
    file, content, words = WHOLE_FILES[name]
    (tmp_path / file).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(GOOD_LINES)
    for on_error in ("stop", "skip"):
        with pytest.raises(EloError, match=words) as it:
            list(read_documents(tmp_path, on_error=on_error))
        assert "damaged" not in str(it.value)


@pytest.mark.parametrize("kind", ["struct", "list", "null"])
def test_a_parquet_column_without_text_is_never_skipped(kind: str, tmp_path: Path) -> None:
    columns: dict[str, dict[str, list]] = {
        "struct": {"doc": [{"text": "a"}, {"text": "b"}]},
        "list": {"text": [["a"], ["b"]]},
        "null": {"text": [None, None]},
    }
    path = write_parquet(tmp_path / "a.parquet", columns[kind])
    words = {"struct": "column 'doc' has one inside", "list": "array, not text", "null": "null, not text"}[kind]
    with pytest.raises(EloError, match=words):
        list(read_documents(path, on_error="skip"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_bytes_after_the_compressed_data_are_called_that_and_zeros_are_padding(name: str, tmp_path: Path) -> None:
    data = gzip.compress(GOOD_LINES) if name.endswith("gz") else zstandard.compress(GOOD_LINES)
    path = tmp_path / name
    for padded in (data + bytes(513), data + bytes(7) + data):
        path.write_bytes(padded)
        assert list(read_documents(path)) == TEXTS[:3] * padded.count(data[:8])
    path.write_bytes(data + b"garbage")
    with pytest.raises(EloError, match=r":4: the compressed data ends here, but other bytes follow"):
        list(read_documents(path))
    assert list(read_documents(path, on_error="skip")) == TEXTS[:3]


def test_joined_files_with_byte_order_marks_and_nul_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINES + b"\xef\xbb\xbf" + GOOD_LINES)
    assert list(read_documents(path)) == TEXTS[:3] * 2
    path.write_bytes(GOOD_LINES + bytes(4096))
    with pytest.raises(EloError, match=r"a\.jsonl:4: not valid JSON: NUL bytes"):
        list(read_documents(path))
    path.write_bytes(b'{"text": "a\\u0000b"}\n')
    assert list(read_documents(path)) == ["a\0b"]
