"""launch/data.py, launch/packing.py: rows of documents, their order, the position in it."""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import save_tokenizer

from sparring.cp import ContextParallel
from sparring.launch import train
from sparring.launch.config import TrainConfig
from sparring.launch.corpus import Corpus
from sparring.launch.data import PackedText, prepare_rows
from sparring.launch.packing import IGNORE, PACKINGS, PAD, pack
from sparring.launch.tokens import BEGIN, encode

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def corpus_of(*lengths):
    """Documents of `lengths` tokens that all differ, in order."""
    tokens = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    return Corpus.of(tokens, vocab_size=2**16)


def letters(*lengths):
    """Documents of `lengths` bytes, each of a letter of its own, and BEGIN."""
    return Corpus.of([encode(bytes([97 + i]) * length) for i, length in enumerate(lengths)])


def numbered(rows):
    """Rows of 8 tokens that all differ."""
    return pack(corpus_of(rows * 8), 8)


def rows_of(data, batches):
    return [tuple(row.tolist()) for _ in range(batches) for row in next(data)["input_ids"]]


# -- packing ------------------------------------------------------------------------------------------


def test_default_data_sees_more_than_a_quarter_of_the_sequence(tmp_path):
    for seq_len in (8192, 65536):
        rows = prepare_rows(TrainConfig(out=str(tmp_path), seq_len=seq_len), chief=True)
        assert rows.mean_visible_context > seq_len / 4


@settings(deadline=None, derandomize=True, max_examples=60)
@given(LENGTHS, st.integers(1, 16))
def test_concat_against_a_loop(lengths, seq_len):
    corpus = corpus_of(*lengths)
    flat = [
        (token, at == 0) for d in np.split(corpus.tokens, corpus.offsets[1:-1]) for at, token in enumerate(d)
    ]
    if len(flat) < seq_len:
        with pytest.raises(ValueError, match=f"{len(flat)} tokens.*seq_len={seq_len}"):
            pack(corpus, seq_len)
        return
    rows = pack(corpus, seq_len)
    assert len(rows) == len(flat) // seq_len and rows.padding == 0
    batch = rows.batch(list(range(len(rows))))
    assert "attention_mask" not in batch
    position, cells = 0, zip(batch["input_ids"].flatten(), batch["position_ids"].flatten(), strict=True)
    for seen, (token, at) in enumerate(cells):
        expected, first = flat[seen]
        position = 0 if first or seen % seq_len == 0 else position + 1
        assert (token, at) == (expected, position)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(LENGTHS.filter(any), st.integers(1, 16))
def test_best_fit_keeps_every_token_and_cuts_no_document_that_fits(lengths, seq_len):
    corpus = corpus_of(*lengths)
    rows = pack(corpus, seq_len, "best-fit")
    pieces = sorted(zip(rows.begins.tolist(), rows.lengths.tolist(), strict=True))
    expected = []
    for begin, end in zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True):
        expected += [(at, min(seq_len, end - at)) for at in range(begin, end, seq_len)]
    assert pieces == expected  # documents cut from their beginning, where they are longer than a row

    used = np.add.reduceat(rows.lengths, rows.first[:-1])
    assert (used <= seq_len).all() and (used > 0).all()
    # A later row holds nothing that had room in an earlier one: two rows never fit into one.
    assert len(used) < 2 or np.sort(used)[:2].sum() > seq_len
    batch = rows.batch(list(range(len(rows))))
    filled = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert filled.sum(1).tolist() == used.tolist()
    assert sorted(batch["input_ids"][filled].tolist()) == corpus.tokens.tolist()
    assert ("attention_mask" in batch) == (rows.padding > 0)
    assert rows.padding == pytest.approx(1 - filled.double().mean().item())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(LENGTHS.filter(any), st.integers(1, 16), st.sampled_from(sorted(PACKINGS)))
def test_labels_and_context_of_both_packings(lengths, seq_len, packing):
    corpus = corpus_of(*lengths)
    if packing == "concat" and len(corpus.tokens) < seq_len:
        return
    rows = pack(corpus, seq_len, packing)
    batch = rows.batch(list(range(len(rows))))
    filled = batch["input_ids"] > PAD  # no document here has that token
    first = batch["position_ids"] == 0
    assert (batch["labels"][first | ~filled] == IGNORE).all()
    inside = filled & ~first
    assert torch.equal(batch["labels"][inside], batch["input_ids"][inside])  # not shifted
    follows = batch["input_ids"][:, 1:] == batch["input_ids"][:, :-1] + 1
    assert follows[inside[:, 1:]].all()  # a position that goes on is of the same document
    mean = (batch["position_ids"][filled] + 1).double().mean().item()
    assert rows.mean_visible_context == pytest.approx(mean)


def test_mean_visible_context_counts_own_document_and_oneself():
    rows = pack(letters(2, 1), 5)  # each begins with BEGIN
    assert rows.mean_visible_context == pytest.approx((1 + 2 + 3 + 1 + 2) / 5)
    assert pack(letters(500), 100).mean_visible_context == pytest.approx(50.5)


def test_best_fit_packs_better_than_documents_in_their_order():
    rows = pack(corpus_of(5, 5, 3, 3, 2, 2), 10, "best-fit")
    assert len(rows) == 2 and rows.padding == 0
    assert np.add.reduceat(rows.lengths, rows.first[:-1]).tolist() == [10, 10]


def test_document_boundaries_do_not_depend_on_tokens():
    """Documents of one repeated token: where they begin is known all the same."""
    rows = pack(Corpus.of([np.full(3, BEGIN), np.full(4, BEGIN)]), 7)
    assert rows.batch([0])["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]


def test_padded_rows_shard_into_their_documents():
    batch = pack(corpus_of(20, 37), 48, "best-fit").batch([0, 1])
    cp = ContextParallel(None, block_size=16)
    shard = cp.shard(batch)
    assert shard.geometry.documents == (((0, 37),), ((0, 20),))
    assert (shard.labels != IGNORE).sum() == 36 + 19
    cp.close()


def test_batches_have_the_promised_tensors():
    batch = next(PackedText(pack(letters(50, 30, 200), 32), batch=2))
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    for tensor in batch.values():
        assert tensor.shape == (2, 32) and tensor.dtype == torch.int64
    assert (batch["position_ids"] == 0)[batch["input_ids"] == BEGIN].all()


# -- the whole way ------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_model_is_the_default(tmp_path):
    (tmp_path / "text.txt").write_text("a b c " * 10)
    folder = save_tokenizer(tmp_path / "model", bos_token="[BEGIN]")
    config = TrainConfig(out=str(tmp_path), data=str(tmp_path / "text.txt"), seq_len=10, block_size=2)
    assert prepare_rows(replace(config, model=folder), chief=True).corpus.tokens[:4].tolist() == [
        6,
        9,
        12,
        15,
    ]
    for changes in ({"model": folder, "tokenizer": "bytes"}, {}):
        tokens = prepare_rows(replace(config, **changes), chief=True).corpus.tokens
        assert tokens[:4].tolist() == [BEGIN, *b"a b"]
    assert replace(config, tokenizer="bytes").absolute().tokenizer == "bytes"
    assert replace(config, tokenizer="x").absolute().tokenizer == str(Path("x").absolute())


def test_a_run_on_padded_rows_of_any_tokenizer_tells_its_padding(tmp_path, capsys, monkeypatch):
    records = [json.dumps({"body": "a b c " * (20 + 7 * i)}) for i in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    config = TrainConfig(
        data=str(tmp_path / "text.jsonl"),
        text_field="body",
        tokenizer=save_tokenizer(tmp_path / "tokenizer", eos_token="[END]"),
        packing="best-fit",
        out=str(tmp_path / "out"),
        **{"seq_len": 256, "block_size": 32, "steps": 3, "warmup": 0, "save_every": 0, "device": "cpu"},
        **{"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32, "compare": False},
    )
    rows = prepare_rows(config, chief=True)
    assert 0.05 < rows.padding < 0.5
    monkeypatch.setattr(train, "finish", lambda *_: None)  # which draws a report
    before = threading.active_count()
    summary = train.run(config)
    assert summary["padding"] == rows.padding
    assert f"padding: {rows.padding:.2%} of {len(rows)} rows" in capsys.readouterr().out
    assert np.isfinite(summary["loss_last"])
    assert threading.active_count() == before  # the thread that made batches ahead has ended


# -- order and position -------------------------------------------------------------------------------


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


PHASE = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))  # batch, dp, steps


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(PHASE, min_size=1, max_size=4), st.integers(9, 14))
def test_no_row_is_lost_or_repeated_when_a_run_goes_on_at_another_dp_and_batch(phases, count):
    rows = numbered(count)
    seen, state = [], PackedText(rows).state_dict()
    for batch, dp_size, steps in phases:
        replicas = [PackedText(rows, batch=batch, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
        for data in replicas:
            data.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            seen += [row for data in replicas for row in rows_of(data, 1)]
        states = [data.state_dict() for data in replicas]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert seen == rows_of(PackedText(rows), len(seen))
    for epoch in range(len(seen) // count):
        assert len(set(seen[epoch * count : (epoch + 1) * count])) == count


def test_a_checkpoint_fits_another_dp_with_as_many_sequences_a_step_wherever_the_data_lies():
    saved = asdict(TrainConfig(batch=1, dp=4, data="here.txt"))
    assert TrainConfig(batch=2, dp=2, data="there.txt").differences(saved) == []
    assert TrainConfig(batch=3).differences(saved) == ["batch x dp: checkpoint 1 x 4, now 3 x 1"]


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
    other = pack(Corpus.of([np.arange(80)], vocab_size=2**16), 8)  # as many rows, of other tokens
    with pytest.raises(ValueError, match="identity=.*resume with the same data, tokenizer"):
        PackedText(other).load_state_dict(state)


def test_identity_is_that_of_the_rows():
    """Same tokens in the same rows: equal; other tokens, boundaries, seq_len or packing: not."""
    base = pack(corpus_of(30, 50), 8).identity
    assert pack(corpus_of(30, 50), 8).identity == base
    others = [pack(corpus_of(50, 30), 8), pack(corpus_of(30, 50), 16), pack(corpus_of(30, 50), 8, "best-fit")]
    others.append(pack(Corpus.of([np.arange(30), np.arange(50)], vocab_size=2**16), 8))
    assert len({base, *(rows.identity for rows in others)}) == 5


def test_too_little_data_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="11 tokens.*seq_len=12"):
        pack(letters(10), 12)
    with pytest.raises(ValueError, match=r"10 sequences.*12 of one step \(batch=4 x dp=3\)"):
        PackedText(numbered(10), batch=4, dp_size=3)
