"""tools.bench.passes: the plan of an evaluation against one made by hand, and batches counted on the CPU."""

import dataclasses
import json
import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt as t
from tools.bench import anatomy, passes
from tools.files import Refused

SIZES = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, xsa_last_n=1, ve_layers=())
SIZES |= dict(bigram_vocab_size=0, train_seq_len=32, train_batch_tokens=64, micro_batch_tokens=64, dtype="bf16")
TINY = t.Config(**SIZES, eval_stride=8, eval_batch_seqs=4, ttt_chunk_tokens=8, ttt_batch_seqs=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorder():
    with anatomy.Recorder("cpu") as recorder:
        yield recorder


@pytest.fixture
def row(recorder):
    return passes.Row(TINY, CPU, recorder)


def test_the_split_has_the_documents_and_tokens_of_the_contest():
    for vocabulary, tokens in passes.TOKENS.items():
        documents = passes.split(vocabulary)
        lengths = [end - first for first, end in documents]
        assert len(documents) == 50_000 and min(lengths) >= 2 and all(a[1] == b[0] for a, b in pairwise(documents))
        assert sum(lengths) == pytest.approx(tokens, rel=0.002)
        assert statistics.median(lengths) == pytest.approx(passes.MEDIAN * statistics.mean(lengths), rel=0.02)


@pytest.mark.parametrize("stride", [8, 32])
def test_eight_ranks_score_every_target_in_batches_of_windows(row, stride):
    batches = math.ceil(62_021_632 / stride / 8 / 4)
    assert passes.batches(TINY, stride) == batches
    nothing, (_, launches, _) = row.second(lambda: None), row.windows(stride)
    assert (nothing == 0).all() and launches % batches == 0 and launches / batches > 50


def test_scoring_and_learning_launch_and_a_longer_context_moves_more(row):
    found = row.contexts(2)
    assert len(found) == 5  # contexts of 8, 16, 24, 32 and again 32 tokens
    assert all(scoring[1] > 50 and learning[1] > scoring[1] / 2 for scoring, learning in found)  # two experts score, one learns
    gb = [scoring[2] for scoring, _ in found]
    assert gb[0] < gb[1] < gb[3] == pytest.approx(gb[4])


def test_every_batch_counts_its_chunks_by_their_context_and_nothing_is_learned_from_the_last(row, monkeypatch):
    spans = [(0, 20), (20, 40), (40, 44), (44, 200)]  # 3, 3, 1 and 20 chunks of 8
    monkeypatch.setattr(passes, "RANKS", 2)
    learning = np.array([100.0, 1, 0])

    def contexts(rows):
        return [(np.array([rows * (chunk + 1.0), 1, 0]), learning) for chunk in range(5)]

    monkeypatch.setattr(row, "contexts", contexts)
    ranks = sorted(total.tolist() for total in row.documents(spans))
    assert ranks == [[2 * (1 + 2 + 3) + 200 + 1, 5 + 1, 0], [15 + 15 * 5 + 19 * 100, 39, 0]]


def test_a_pass_over_the_stream_adapts_every_chunk_as_often_as_asked(recorder):
    stream = dict(ttt_scope="stream", ttt_lora_rank=0, ttt_params=("*",), ttt_chunk_tokens=128, ttt_epochs=3)
    row = passes.Row(dataclasses.replace(TINY, **stream, ttt_batch_seqs=2), CPU, recorder)
    steps = 3 * 2 * math.ceil(62_021_632 / 128)
    launches = row.stream()[1]
    assert launches % steps == 0 and launches > 100 * steps


def test_a_row_has_the_slowest_rank_of_each_pass(recorder, monkeypatch):
    """Windows of one batch each, and two ranks of which the second is slower."""
    monkeypatch.setattr(passes.Row, "windows", lambda row, stride: np.array([1.04, stride, 2.6]))
    monkeypatch.setattr(passes.Row, "documents", lambda row, spans: [np.array([n, 7.0, 9.0]) for n in (1.0, 3.0)])
    plain, sliding = dict(seconds=1.0, launches=32, gb=3), dict(seconds=1.0, launches=8, gb=3)
    adapting = dict(seconds=3.0, launches=7, gb=9)
    found = passes.count(TINY, CPU, recorder)
    assert found == dict(name="card", plain=plain, sliding=sliding, adapting=adapting, seconds=5.1)
    assert "adapting" not in passes.count(dataclasses.replace(TINY, ttt_epochs=0), CPU, recorder)


def test_the_table_has_a_row_a_count(tmp_path, capsys):
    found = {name: dict(seconds=1.5, launches=2000, gb=3000) for name in ("plain", "sliding", "adapting")}
    (tmp_path / "passes.json").write_text(json.dumps([dict(name="card", torch="2", seconds=4.5) | found]))
    passes.main(["--table", "--json", str(tmp_path / "passes.json")])
    assert capsys.readouterr().out.splitlines()[2] == "| `card` | 1.5 | 1.5 | 1.5 | 2,000 | 3.0 | 4.5 |"
    passes.main(["--table", "--json", str(ROOT / "logs" / "passes.json")])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(json.loads((ROOT / "logs/passes.json").read_text()))


def test_a_vocabulary_of_unknown_length_is_refused(recorder):
    with pytest.raises(Refused, match="VOCAB_SIZE=4096: the contest's split has 1024 or 8192 pieces"):
        passes.count(dataclasses.replace(TINY, vocab_size=4096), CPU, recorder)
