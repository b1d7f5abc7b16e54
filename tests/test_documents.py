"""launch/documents.py: what is read from each kind of file and folder, and what is refused."""

import json

import machine
import pytest

from sparring.launch.documents import find_sources, packages, read_package

TEXTS = ["one", "two \xe4 \u2603", "", "four\nlines"]


def read(path, field="text"):
    found = find_sources(None if path is None else str(path))
    return [text.decode() for source in found for text in source.read(source.path, field)]


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_standard_library_is_deterministic_and_one_document_is_one_folder():
    documents = read(None)
    assert documents == read(None) and len(documents) == len(packages())
    (holding,) = [d for d in documents if "class JSONDecoder" in d]
    assert "class JSONEncoder" in holding  # json/encoder.py is in the document of json/decoder.py
    assert "class OrderedDict" not in holding  # collections/ is another


def test_a_folder_changes_when_one_of_its_modules_does(tmp_path):
    (tmp_path / "b.py").write_text("b = 1")
    (tmp_path / "a.py").write_text("a = 1")
    assert list(read_package(tmp_path, "")) == [b"a = 1\nb = 1"]


def test_text_is_a_file_or_the_visible_text_files_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"bb")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_bytes(b"aaa")
    (tmp_path / "picture").write_bytes(b"x\0y")
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "deep" / "round").symlink_to(tmp_path)
    assert read(tmp_path) == ["bb", "aaa"]
    assert read(tmp_path / "b.txt") == ["bb"]


@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines(tmp_path, field):
    path = write_lines(tmp_path / "a.jsonl", [{"id": 3, field: text} for text in TEXTS])
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    assert read(path, field) == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a.jsonl:3: no JSON \(.* column 14 .*mend or remove the line"),
        ('{"text": "\\ud800"}', r"a.jsonl:3: 'text' is no Unicode text .*surrogates.*mend"),
        ('"text"', "a.jsonl:3: a JSON str; each line must be an object"),
        ('{"body": "x", "id": 1}', r"a.jsonl:3: no field 'text' among \['body', 'id'\]; name the text with"),
        ('{"text": null}', "a.jsonl:3: 'text' is of NoneType; it must be a string"),
        ("[" * 100_000, "a.jsonl:3: no JSON .*recursion"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    with pytest.raises(ValueError, match=message):
        read(path)


@machine.needs("pyarrow")
def test_parquet(tmp_path):
    texts = [f"{i} {TEXTS[i % 4]}" for i in range(200)]  # more than are read at once
    path = write_parquet(tmp_path / "a.parquet", {"id": range(200), "content": texts})
    assert read(path, "content") == texts
    with pytest.raises(ValueError, match=r"a.parquet: no field 'text' among \['id', 'content'\]"):
        read(path)
    with pytest.raises(ValueError, match="a.parquet: row 1: 'id' is of int; it must be a string"):
        read(path, "id")
    write_parquet(tmp_path / "b.parquet", {"text": ["a"] * 70 + [None]})
    with pytest.raises(ValueError, match="b.parquet: row 71: 'text' is of NoneType"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="c.parquet: no Parquet file .*; supported are text files"):
        read(tmp_path / "c.parquet")


@machine.needs("datasets")
def test_datasets_on_disk(tmp_path):
    """Saved whole; after rows were chosen, which saves their indices; its arrow files alone; its splits."""
    import datasets

    texts = [f"{i} {TEXTS[i % 4]}" for i in range(200)]
    whole = datasets.Dataset.from_dict({"id": list(range(200)), "text": texts})
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    assert read(tmp_path / "whole") == texts
    assert len(find_sources(str(tmp_path / "whole"))) == 1
    whole.select([7, 3]).with_format("numpy").save_to_disk(tmp_path / "some")
    assert read(tmp_path / "some") == [texts[7], texts[3]]
    with pytest.raises(ValueError, match=r"some: no field 'body' among \['id', 'text'\]"):
        read(tmp_path / "some", "body")
    (tmp_path / "whole" / "state.json").unlink()  # now a folder of arrow files, and one that describes them
    assert read(tmp_path / "whole") == texts
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1, or not")
    with pytest.raises(ValueError, match="bad.arrow: no Arrow stream .*; supported are"):
        read(tmp_path / "bad.arrow")
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "dict")
    with pytest.raises(
        ValueError, match=r"dict holds the splits \['test', 'train'\].*give the folder of one"
    ):
        read(tmp_path / "dict")


def test_records_of_a_folder_are_read_and_not_the_files_that_describe_them(tmp_path):
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / "data").mkdir()
    for name in "ba":
        write_lines(tmp_path / "data" / f"{name}.jsonl", [{"text": name}, {"text": name * 2}])
    assert read(tmp_path) == ["a", "aa", "b", "bb"]


@pytest.mark.parametrize("name", ["missing", "zeros.bin", "empty.txt", "folder"])
def test_anything_else_is_refused_with_what_is_supported(tmp_path, name):
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "zeros.bin").write_bytes(b"a\0b")
    reason = "no such file or folder" if name == "missing" else "it holds no text"
    with pytest.raises(ValueError, match=f"{name}: {reason}; supported are text files, .jsonl"):
        find_sources(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.arrow", "datasets"), ("saved", "datasets")]
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, name, package):
    for module in ("pyarrow.parquet", "pyarrow", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, module, None)  # import raises
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.arrow").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    for file in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"needs the package {package}; pip install 'sparring\[data\]'"):
        read(tmp_path / name)
