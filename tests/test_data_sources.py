"""Reading documents: every format, and every bad input named by file and line."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_fixtures import make_texts, write_jsonl

from elo.data.sources import TEXT_LIMIT, FileReader, list_inputs, read_documents
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


def test_folders_and_globs_are_listed_in_order_without_hidden_or_unknown_files(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.txt", "notes.md", ".hidden.jsonl", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [Path(f.location).name for f in list_inputs(str(tmp_path))] == ["a.txt", "10.jsonl", "2.jsonl"]
    assert [Path(f.location).name for f in list_inputs(f"{tmp_path}/**/*.jsonl")] == ["10.jsonl", "2.jsonl"]
    odd = tmp_path / "odd[1].jsonl"
    odd.write_text('{"text": "x"}\n')
    assert [f.location for f in list_inputs(str(odd))] == [str(odd)]


BAD_LINES = {
    "broken": (b'{"text": "cut', "not a line of JSON"),
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
    "two objects": (b'{"text": "a"} {"text": "b"}', "not a line of JSON (Extra data"),
    "deep": (b'{"text": ' + b"[" * 100_000, "not a line of JSON"),
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
        "blank.jsonl": (b"\n \n", ":1: no document in the whole file"),
        "blank.txt": (b"\n\n", ":1: no document in the whole file"),
        "short.jsonl.gz": (gzip.compress(data)[:-20], ": the file is damaged from here on"),
        "not.jsonl.gz": (data, ":1: the file is damaged from here on (Not a gzipped file"),
        "flip.jsonl.gz": (gzip.compress(data)[:-8] + b"\0" * 8, ": the file is damaged from here on (CRC"),
        "short.jsonl.zst": (zstandard.compress(data)[:-20], ": the file is damaged from here on"),
        "not.jsonl.zst": (data, ":1: the file is damaged from here on"),
        "not.parquet": (data, ":1: the file is damaged from here on"),
        "latin.txt": ("eins\nzwei\nschön\n".encode("latin-1"), ":3: not UTF-8 (byte 0xf6 at byte 4 of the line)"),
        "utf16.jsonl": (data.decode().encode("utf-16"), ":1: not UTF-8"),
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
    found["none.parquet"] = (none, ":1: no document in the whole file")
    return found


LOST_WHOLE = (
    "not.jsonl.gz",
    "not.jsonl.zst",
    "short.jsonl.zst",
    "not.parquet",
    "short.parquet",
    "holes.parquet",
    "column.parquet",
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
        f"{tmp_path}/folder*": "the pattern matches folders only",
        f"{tmp_path}/empty": "the folder has no file to read; it needs .jsonl",
        f"{tmp_path}/data.json": "unknown kind of file '.json'; use .jsonl",
        f"{tmp_path}/data.csv": "unknown kind of file '.csv'",
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
