"""launch/data.py: documents, packing, order, position."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.launch.data import (
    BEGIN,
    IGNORE,
    PackedText,
    decode,
    encode,
    pack,
    read_documents,
    standard_library,
)


@pytest.fixture(scope="module")
def library():
    return read_documents(None)


def documents_of(*lengths):
    """Documents of `lengths` bytes, each of a letter of its own."""
    return [encode(bytes([97 + i]) * length) for i, length in enumerate(lengths)]


def test_encode_and_decode_are_inverse():
    text = "def f():\n    return '\xe4\xf6 \u2603'\n"
    tokens = encode(text.encode())
    assert tokens[0] == BEGIN and len(tokens) == len(text.encode()) + 1
    assert decode(torch.from_numpy(tokens.astype(np.int64))[1:]) == text


def test_standard_library_is_deterministic_and_one_document_is_one_folder():
    documents = list(standard_library())
    assert documents == list(standard_library())
    holding = [d for d in documents if b"class JSONDecoder" in d]
    assert len(holding) == 1
    assert b"class JSONEncoder" in holding[0]  # json/encoder.py is in the document of json/decoder.py
    assert b"class OrderedDict" not in holding[0]  # collections/ is another


def test_default_data_sees_more_than_a_quarter_of_the_sequence(library):
    assert pack(library, 8192).mean_visible_context > 8192 / 4
    assert pack(library, 65536).mean_visible_context > 65536 / 4


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 16))
def test_packing_against_a_loop(lengths, seq_len):
    documents = documents_of(*lengths)
    flat = [(token, at) for d in documents for at, token in enumerate(d.tolist())]
    if len(flat) < seq_len:
        with pytest.raises(ValueError, match=f"{len(flat)} tokens.*seq_len={seq_len}"):
            pack(documents, seq_len)
        return
    rows = pack(documents, seq_len)
    tokens, positions = rows.tokens, rows.positions
    assert tokens.shape == positions.shape == (len(flat) // seq_len, seq_len)
    seen, position = 0, 0
    for row, row_positions in zip(tokens, positions, strict=True):
        for column, (token, at) in enumerate(zip(row, row_positions, strict=True)):
            expected, place = flat[seen]
            position = 0 if place == 0 or column == 0 else position + 1
            assert (token, at) == (expected, position)
            seen += 1


def test_mean_visible_context_counts_own_document_and_oneself():
    rows = pack(documents_of(2, 1), 5)  # each begins with BEGIN
    assert rows.mean_visible_context == pytest.approx((1 + 2 + 3 + 1 + 2) / 5)
    assert pack(documents_of(500), 100).mean_visible_context == pytest.approx(50.5)


def test_batches_have_the_promised_tensors():
    data = PackedText(pack(documents_of(50, 30, 200), 32), batch=2)
    batch = next(data)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    for tensor in batch.values():
        assert tensor.shape == (2, 32) and tensor.dtype == torch.int64
    first = batch["position_ids"] == 0
    assert first.any()
    assert torch.equal(batch["labels"][~first], batch["input_ids"][~first])  # not shifted
    assert (batch["labels"][first] == IGNORE).all()
    begins = batch["input_ids"] == BEGIN
    assert first[begins].all()


def rows_of(data, batches):
    return [tuple(row.tolist()) for _ in range(batches) for row in next(data)["input_ids"]]


def numbered(rows):
    """Rows of 8 tokens that all differ, of one document."""
    content = np.arange(rows * 8 - 1) // 8 % 250
    return pack([encode(content.astype(np.uint8).tobytes())], 8)


def test_an_epoch_visits_every_row_once_in_an_order_of_seed_and_epoch():
    make = lambda seed: PackedText(numbered(12), batch=3, seed=seed)  # noqa: E731
    data = make(0)
    first, second = rows_of(data, 4), rows_of(data, 4)
    assert len(set(first)) == 12 and set(first) == set(second) and first != second
    assert rows_of(make(0), 4) == first
    assert rows_of(make(1), 4) != first


def test_only_the_data_parallel_coordinate_changes_what_is_read():
    def make(batch, dp_rank, dp_size):
        return PackedText(numbered(13), batch=batch, dp_rank=dp_rank, dp_size=dp_size)

    whole = make(4, 0, 1)
    left, right = make(2, 0, 2), make(2, 1, 2)
    for _ in range(7):  # over the end of two epochs
        assert rows_of(whole, 1) == rows_of(left, 1) + rows_of(right, 1)


def test_position_is_restored_in_the_middle_of_an_epoch_and_through_json():
    data = PackedText(numbered(10), batch=3)
    rows_of(data, 5)
    state = json.loads(json.dumps(data.state_dict()))
    rest = rows_of(data, 6)
    other = PackedText(numbered(10), batch=3)
    other.load_state_dict(state)
    assert rows_of(other, 6) == rest


def test_a_position_of_other_data_is_refused():
    state = PackedText(numbered(10)).state_dict()
    with pytest.raises(ValueError, match="rows=10.*rows=9"):
        PackedText(numbered(9)).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=0.*seed=1"):
        PackedText(numbered(10), seed=1).load_state_dict(state)


def test_too_little_data_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="11 tokens.*seq_len=12"):
        pack(documents_of(10), 12)
    with pytest.raises(ValueError, match=r"10 sequences.*12 of one step \(batch=4 x dp=3\)"):
        PackedText(numbered(10), batch=4, dp_size=3)


def test_own_text_is_a_file_or_the_visible_text_files_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"bb")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_bytes(b"aaa")
    (tmp_path / "picture").write_bytes(b"x\0y")
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / "empty").write_bytes(b"")
    found = [bytes(d[1:].astype(np.uint8)) for d in read_documents(str(tmp_path))]
    assert found == [b"bb", b"aaa"]
    (one,) = read_documents(str(tmp_path / "b.txt"))
    assert one.tolist() == [BEGIN, 98, 98]
    with pytest.raises(ValueError, match="no such file"):
        read_documents(str(tmp_path / "missing"))
