"""The shuffled loader: each row of an epoch once, in random order, the same for any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from test_data import write_shard

import train_gpt as t

SIZES = (100, 37, 20, 15, 66)  # tokens a shard; the fourth holds no row wherever it is cut


@pytest.fixture
def shuffled(tmp_path):
    """(settings, stream) of shards whose tokens are their positions in the stream."""
    edges = np.cumsum((0, *SIZES))
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(len(SIZES))]
    for path, low, high in zip(paths, edges, edges[1:]):
        write_shard(path, np.arange(low, high))
    cfg = t.Config(loader="shuffled", train_seq_len=8, train_batch_tokens=32, micro_batch_tokens=16, eval_stride=8, seed=3, ttt_epochs=0)
    return cfg, t.TokenStream(paths, 65536)


def rows_of(cfg, stream, steps, ranks=None):
    """The rows (steps * rows, seq_len + 1) that a rank reads in `steps` steps."""
    batches = t.Batches(stream, cfg, ranks or t.Ranks())
    parts = [next(batches) for _ in range(steps)]
    return torch.cat([torch.cat((x, y[..., -1:]), -1).flatten(0, 1) for x, y in parts]).numpy()


EPOCH = 11 + 3 + 1 + 7  # rows: a shard of N tokens has (N - 1) // 8 - 1, so that any cut leaves room for them


def test_every_row_of_an_epoch_is_used_once_and_lies_inside_one_shard(shuffled):
    cfg, stream = shuffled
    edges = np.cumsum((0, *SIZES))
    rows = rows_of(cfg, stream, 3 * EPOCH)  # 4 rows a step: 12 epochs
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in range(12):
        starts = rows[epoch * EPOCH : (epoch + 1) * EPOCH, 0]
        assert len(set(starts)) == EPOCH and starts.tolist() != sorted(starts)
        for low, high in zip(edges, edges[1:]):
            inside = np.sort(starts[(starts >= low) & (starts < high)])
            assert len(inside) == max((high - low - 1) // 8 - 1, 0) and (np.diff(inside) == 8).all()
            assert not len(inside) or (inside[0] - low < 8 and inside[-1] + 8 < high)


def test_each_epoch_and_each_seed_has_an_order_and_cuts_of_its_own(shuffled):
    cfg, stream = shuffled
    rows = rows_of(cfg, stream, 2 * EPOCH)
    epochs = rows[:, 0].reshape(8, EPOCH)
    assert len({tuple(e) for e in epochs}) == 8 and len({tuple(sorted(e)) for e in epochs}) > 4
    assert np.array_equal(rows_of(cfg, stream, 2 * EPOCH), rows)
    other = rows_of(dataclasses.replace(cfg, seed=4), stream, 2 * EPOCH)[:, 0].reshape(8, EPOCH)
    assert len({tuple(e) for e in (*epochs, *other)}) == 16
    plain = dataclasses.replace(cfg, loader="stream")
    assert np.array_equal(rows_of(plain, stream, 3), rows_of(dataclasses.replace(plain, seed=4), stream, 3))
    assert rows_of(plain, stream, 3)[:, 0].tolist() == list(range(0, 96, 8))


def test_shards_are_mixed_in_proportion_to_their_rows(shuffled):
    cfg, stream = shuffled
    starts = rows_of(cfg, stream, 50 * EPOCH)[:, 0].reshape(200, EPOCH)
    assert (starts[:, :4] < 100).mean() == pytest.approx(11 / EPOCH, abs=0.06)
    assert len(set((starts[:, 0] % 8).tolist())) == 8


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_same_shuffled_global_batch(shuffled, world):
    cfg, stream = shuffled
    expected = rows_of(cfg, stream, 12).reshape(12, 4, 9)  # across two ends of an epoch
    shares = [rows_of(cfg, stream, 12, t.Ranks(rank, world)).reshape(12, 4 // world, 9) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares, axis=1), expected)


def test_going_back_gives_the_same_shuffled_batches_again(shuffled):
    cfg, stream = shuffled
    batches = t.Batches(stream, cfg, t.Ranks())
    first = [next(batches) for _ in range(14)]
    for step in (0, 13, 5, 6, 3):  # 5 and 6 lie on both sides of, and across, the end of the first epoch
        batches.seek(step, cfg.train_seq_len)
        assert batches.step == step
        assert all(torch.equal(a, b) for a, b in zip(next(batches), first[step]))
    assert batches.step == 4 and all(torch.equal(a, b) for a, b in zip(next(batches), first[4]))


def test_shards_too_small_to_shuffle_are_an_error(shuffled, tmp_path):
    cfg, _ = shuffled
    for size, fits in ((16, False), (17, True)):
        path = tmp_path / f"of_{size}.bin"
        write_shard(path, np.arange(size))
        stream = t.TokenStream([path, path], 65536)
        if fits:
            assert (np.diff(rows_of(cfg, stream, 5), axis=1) == 1).all()
        else:
            with pytest.raises(t.InputError, match="LOADER=shuffled needs a shard of 17 tokens"):
                t.Batches(stream, cfg, t.Ranks())
        assert rows_of(dataclasses.replace(cfg, loader="stream"), stream, 1).shape == (4, 9)


@pytest.mark.parametrize("sizes", [(3, 1, 5, 2), (1,), (40, 2, 1, 90), (2, 2, 100)])
def test_shards_shorter_than_a_row_are_read_whole_in_a_stream(tmp_path, sizes):
    edges = np.cumsum((0, *sizes))
    paths = [tmp_path / f"{i}.bin" for i in range(len(sizes))]
    for path, low, high in zip(paths, edges, edges[1:]):
        write_shard(path, np.arange(low, high))
    cfg = t.Config(train_seq_len=8, train_batch_tokens=32, micro_batch_tokens=16, eval_stride=8, ttt_epochs=0)
    rows = rows_of(cfg, t.TokenStream(paths, 65536), 6)
    assert np.array_equal(rows, (8 * np.arange(24)[:, None] + np.arange(9)) % sum(sizes))


@pytest.mark.parametrize("short", [1, 5, 8, 9, 16])
def test_a_shard_shorter_than_a_row_takes_nothing_from_an_epoch_of_the_others(tmp_path, short):
    sizes = (short, 100, short, 60)
    edges = np.cumsum((0, *sizes))
    paths = [tmp_path / f"{i}.bin" for i in range(len(sizes))]
    for path, low, high in zip(paths, edges, edges[1:]):
        write_shard(path, np.arange(low, high))
    cfg = t.Config(loader="shuffled", train_seq_len=8, train_batch_tokens=8, micro_batch_tokens=8, eval_stride=8, ttt_epochs=0)
    rows = rows_of(cfg, t.TokenStream(paths, 65536), 2 * (11 + 6))  # of 100 and of 60 tokens
    assert (np.diff(rows, axis=1) == 1).all()
    for starts in rows[:17, 0], rows[17:, 0]:
        assert sum((edges[1] <= starts) & (starts + 8 < edges[2])) == 11 and sum((edges[3] <= starts) & (starts + 8 < edges[4])) == 6
        assert len({*starts}) == 17
