"""launch/tokens.py, launch/corpus.py: text as tokens, once for all ranks and runs."""

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import save_tokenizer

from sparring.launch import corpus as module
from sparring.launch.corpus import Corpus, await_folder, dtype_of, open_corpus, prepare_corpus, write_corpus
from sparring.launch.tokens import BEGIN, BYTES, VOCAB_SIZE, ByteTokenizer, encode, load_tokenizer


@pytest.fixture
def text(tmp_path):
    """A folder of two documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "1.txt").write_text("a b a")
    (folder / "2.txt").write_text("c b")
    return folder


def prepare(tmp_path, text, tokenizer=BYTES, chief=True, timeout=20.0):
    return prepare_corpus(tmp_path / "tokens", str(text), "text", tokenizer, chief=chief, timeout=timeout)


def documents(corpus):
    return [part.tolist() for part in np.split(corpus.tokens, corpus.offsets[1:-1])]


# -- tokenizers ---------------------------------------------------------------------------------------


@given(st.binary(max_size=50))
def test_byte_tokens_are_begin_and_the_bytes(text):
    tokens = encode(text)
    assert tokens[0] == BEGIN and bytes(tokens[1:].tolist()) == text and tokens.dtype == np.uint16
    assert max(tokens.tolist()) < VOCAB_SIZE


@pytest.mark.parametrize(
    ("special", "before", "after"),
    [
        ({"bos_token": "[BEGIN]", "eos_token": "[END]"}, [6], []),
        ({"eos_token": "[END]"}, [], [3]),
        ({}, [], []),
    ],
    ids=["begin", "end", "neither"],
)
def test_documents_begin_with_bos_or_else_end_with_eos(tmp_path, text, special, before, after):
    corpus = prepare(tmp_path, text, save_tokenizer(tmp_path / "tokenizer", **special))
    assert documents(corpus) == [[*before, 9, 12, 9, *after], [*before, 15, 12, *after]]
    assert corpus.vocab_size == 16  # more than every id, gaps or not


def test_bytes_that_are_no_utf8_read_as_replacement_characters(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))
    assert [x.tolist() for x in tokenizer.encode([b"a \xff b", b""])] == [[9, 0, 12], []]


def test_code_of_a_tokenizer_folder_does_not_run(tmp_path):
    folder, canary = tmp_path / "tokenizer", tmp_path / "canary"
    save_tokenizer(folder)
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\n{code}")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ValueError, match="no tokenizer that loads .*custom code"):
        load_tokenizer(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("content", [{}, {"tokenizer.json": "{"}, {"config.json": '{"model_type": "qwen2"}'}])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, content, text):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, written in content.items():
        (folder / name).write_text(written)
    with pytest.raises(ValueError, match=r"tokenizer: .*; give a folder .*--tokenizer bytes"):
        prepare(tmp_path, text, str(folder))
    with pytest.raises(ValueError, match="--tokenizer gpt2: no such folder; give"):
        prepare(tmp_path, text, "gpt2")  # not looked for on any hub
    assert [path for path in (tmp_path / "tokens").glob("*") if path.suffix != ".partial"] == []


# -- on disk ------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.binary(max_size=9), min_size=1, max_size=200))
def test_what_is_written_is_what_is_in_memory(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus") / "key"
    write_corpus(folder, texts, ByteTokenizer())
    found, expected = open_corpus(folder), Corpus.of([encode(text) for text in texts])
    assert documents(found) == documents(expected)
    assert found.tokens.dtype == np.uint16
    assert (found.vocab_size, found.digest) == (expected.vocab_size, expected.digest)


def test_tokens_are_as_small_as_the_vocabulary_allows():
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        assert dtype_of(vocab_size) == dtype
        assert Corpus.of([np.array([vocab_size - 1])], vocab_size).tokens.tolist() == [vocab_size - 1]


def test_text_is_tokenized_once_and_again_when_it_or_the_tokenizer_changes(tmp_path, text, monkeypatch):
    made, write = [], module.write_corpus
    monkeypatch.setattr(
        module, "write_corpus", lambda folder, *rest: (made.append(folder), write(folder, *rest))
    )
    first = prepare(tmp_path, text)
    assert prepare(tmp_path, text).digest == first.digest and len(made) == 1
    stat = (text / "1.txt").stat()
    (text / "1.txt").write_text("a c a")  # as long as before
    os.utime(text / "1.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert prepare(tmp_path, text).digest != first.digest and len(made) == 2
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    prepare(tmp_path, text, tokenizer)
    prepare(tmp_path, text, tokenizer)
    save_tokenizer(tmp_path / "tokenizer", eos_token="[END]")
    assert documents(prepare(tmp_path, text, tokenizer))[0][-1] == 3
    assert len(set(made)) == len(made) == 4


def test_others_wait_for_the_chief(tmp_path, text):
    found = []
    others = [
        threading.Thread(target=lambda: found.append(prepare(tmp_path, text, chief=False))) for _ in range(3)
    ]
    for other in others:
        other.start()
    time.sleep(0.1)
    assert found == []
    chief = prepare(tmp_path, text)
    for other in others:
        other.join(20)
    assert [each.digest for each in found] == [chief.digest] * 3


def test_waiting_ends_when_nothing_is_written_and_not_while_something_is(tmp_path):
    folder, partial = tmp_path / "key", tmp_path / "key.partial"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="key was not written: 0 bytes so far, none in 0.2 s"):
        await_folder(folder, 0.2)
    assert time.monotonic() - began < 5

    def slowly():
        partial.mkdir()
        for size in range(1, 9):
            (partial / "tokens.bin").write_bytes(bytes(size))
            time.sleep(0.1)
        partial.rename(folder)

    writer = threading.Thread(target=slowly)
    writer.start()
    await_folder(folder, 0.5)  # shorter than all the writing
    writer.join(20)


def test_what_a_crash_left_is_written_again(tmp_path, text, monkeypatch):
    def crash(path, field):
        yield b"some"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "find_sources", lambda data: [module.Source(text / "1.txt", crash)])
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, text)
    partial = [path.name for path in (tmp_path / "tokens").iterdir()]
    assert len(partial) == 1 and partial[0].endswith(".partial")
    assert len(documents(prepare(tmp_path, text / "1.txt"))) == 1
    assert not (tmp_path / "tokens" / partial[0]).exists()  # it was that of the same key


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_damaged_files_are_refused(tmp_path, text, name, harm):
    prepare(tmp_path, text)
    (folder,) = (tmp_path / "tokens").iterdir()
    if harm == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    else:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="damaged.*; remove it, it is made again"):
        prepare(tmp_path, text)
    shutil.rmtree(folder)
    prepare(tmp_path, text)


def test_text_without_tokens_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 2)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="2 documents and 0 tokens; give some text"):
        prepare(tmp_path, tmp_path / "a.jsonl", tokenizer)
