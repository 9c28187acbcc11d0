"""tools.bench.passes: the plan of an evaluation against one made by hand, and batches counted on the CPU."""

import dataclasses
import json
import math
import statistics
from itertools import pairwise

import pytest
import torch

import train_gpt as t
from tools.bench import anatomy, passes
from tools.bench.passes import Counted

TINY = t.Config(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, xsa_last_n=1, ve_layers=(), bigram_vocab_size=0,
                train_seq_len=32, train_batch_tokens=64, micro_batch_tokens=64, eval_stride=8, eval_batch_seqs=4, ttt_chunk_tokens=8,
                ttt_batch_seqs=8, dtype="bf16")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def row():
    with anatomy.Recorder("cpu") as recorder:
        yield passes.Row(TINY, CPU, recorder)


def test_the_split_has_the_documents_and_tokens_of_the_contest():
    for vocabulary, tokens in passes.TOKENS.items():
        documents = passes.split(vocabulary)
        lengths = [end - first for first, end in documents]
        assert len(documents) == 50_000 and min(lengths) >= 2 and all(a[1] == b[0] for a, b in pairwise(documents))
        assert sum(lengths) == pytest.approx(tokens, rel=0.002)
        assert statistics.median(lengths) == pytest.approx(passes.MEDIAN * statistics.mean(lengths), rel=0.02)


@pytest.mark.parametrize("stride, batches", [(8, 62_021_632 / 8 / 8 / 4), (32, 62_021_632 / 32 / 8 / 4)])
def test_eight_ranks_score_every_target_in_batches_of_windows(row, stride, batches):
    one = row.second(lambda: None)
    found = row.windows(stride)
    assert one == Counted(0, 0, 0) and found.launches % math.ceil(batches) == 0 and found.launches / math.ceil(batches) > 50


def test_a_learning_chunk_launches_more_than_its_scoring_and_a_longer_context_takes_longer(row):
    found = row.contexts(2)
    assert len(found) == 5  # contexts of 8, 16, 24, 32 and again 32 tokens
    assert all(learning.launches > scoring.launches > 50 for scoring, learning in found)
    assert found[0][0].gb < found[1][0].gb < found[3][0].gb == pytest.approx(found[4][0].gb)


def test_every_batch_counts_its_chunks_by_their_context_and_the_last_one_teaches_nothing(row, monkeypatch):
    spans = [(0, 20), (20, 40), (40, 44), (44, 200)]  # 3, 3, 1 and 20 chunks of 8
    monkeypatch.setattr(passes, "RANKS", 2)
    monkeypatch.setattr(row, "contexts", lambda rows: [(Counted(rows * (chunk + 1), 1, 0), Counted(100, 1, 0)) for chunk in range(5)])
    ranks = row.documents(spans)
    long, short = Counted(15 + 15 * 5 + 19 * 100, 39, 0), Counted(2 * (1 + 2 + 3) + 200 + 1, 5 + 1, 0)
    assert sorted(ranks) == [short, long]


def test_a_pass_over_the_stream_adapts_every_chunk_as_often_as_asked(row):
    cfg = dataclasses.replace(TINY, ttt_scope="stream", ttt_lora_rank=0, ttt_params=("*",), ttt_chunk_tokens=128, ttt_batch_seqs=2, ttt_epochs=3)
    other = passes.Row(cfg, CPU, row.recorder)
    chunks = math.ceil(62_021_632 / 128)
    assert other.stream().launches % (3 * 2 * chunks) == 0 and other.stream().launches > 3 * 2 * chunks * 100


def test_the_table_has_a_row_a_count(tmp_path, capsys):
    found = {name: dict(seconds=1.5, launches=2000, gb=3000) for name in ("plain", "sliding", "adapting")}
    (tmp_path / "passes.json").write_text(json.dumps([dict(name="card", seconds=4.5) | found]))
    passes.main(["--table", "--json", str(tmp_path / "passes.json")])
    assert capsys.readouterr().out.splitlines()[2] == "| `card` | 1.5 | 1.5 | 1.5 | 2,000 | 3.0 | 4.5 |"


def test_a_vocabulary_of_unknown_length_is_told_in_a_line(monkeypatch):
    monkeypatch.setenv("VOCAB_SIZE", "4096")
    with pytest.raises(t.InputError, match="VOCAB_SIZE=4096: .* for 1024 and 8192 alone"):
        passes.main([])
