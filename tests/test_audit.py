"""An outsider's audit of every kind of evaluation, through tools.model.audit and the AUDIT file alone, and of cheats that it must catch.

AUDIT_TABLE=path, without xdist, writes the largest error of each test and kind as a Markdown table.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, coded, finals, make_model, run
from helpers.smoke import SMOKE

import train_gpt as t
from tools.model.audit import SPLITS, audit, report

V, N = 10, 51  # pieces of the tokenizer, tokens of the stream
FIRSTS = (0, 13, 14, 23, 40)  # where its documents begin
SHARED = dict(num_layers=2, ve_layers=(1,), xsa_last_n=1, eval_seq_len=8, eval_stride=4, eval_batch_seqs=3, ttt_chunk_tokens=16,
              ttt_epochs=1, ttt_batch_seqs=1, compressor="zstd", zstd_level=3)
KINDS = {
    "plain": dict(ttt_epochs=0),
    "sgd": dict(ttt_lr=0.05),
    "apart": dict(ttt_lr=0.05),  # with DOCUMENT_ATTENTION: an artifact of its own
    "pr1812": dict(ttt_lr=0.05, ttt_params=("*.weight", "!blocks.0.*"), ttt_nesterov=True, ttt_z_loss=1e-3, ttt_cosine_floor=0.0,
                   ttt_cosine_tokens=64),
    "pr490": dict(ttt_optimizer="adamw", ttt_params=("blocks.1.*", "*.attn_scale", "tok_emb.*"), ttt_cosine_floor=0.1, ttt_cosine_tokens=40,
                  ttt_temperature=0.9, ttt_lr=0.01),
    "lora": dict(ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_lr=0.02),
    "document": dict(ttt_scope="document", ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_lr=0.02, ttt_beta2=0.95,
                     ttt_chunk_tokens=8, ttt_grad_clip=0.0, ttt_temperature=1.1, ttt_batch_seqs=3),
    "reuse": dict(ttt_scope="document", ttt_lora_rank=5, ttt_lora_scale=1.8, ttt_params=("blocks.*.weight", "tok_emb.*", "!*.c_k.*"),
                     ttt_optimizer="adamw", ttt_lr=0.02, ttt_momentum=0.0, ttt_beta2=0.99, ttt_weight_decay=0.3,
                     ttt_chunk_tokens=16, eval_seq_len=16, ttt_grad_clip=0.0, ttt_batch_seqs=3),
    "mixture": dict(ttt_scope="document", ttt_lora_rank=4, ttt_params=("blocks.*.weight", "tok_emb.*"), ttt_optimizer="adamw", ttt_lr=0.02,
                    ttt_expert_lrs=(0.0, 0.1), ttt_share=0.1, ttt_momentum=0.0, ttt_beta2=0.99, ttt_chunk_tokens=8, ttt_grad_clip=0.0,
                    ttt_batch_seqs=3),
}
LEARN = [kind for kind in KINDS if kind != "plain"]
DOCUMENTS = [kind for kind in LEARN if KINDS[kind].get("ttt_scope") == "document"]
STREAMS = [kind for kind in LEARN if kind not in DOCUMENTS]
ERRORS = defaultdict(dict)
ROUNDING = 2e-6  # nats, between passes whose matrices have other shapes: no BLAS promises equal bits for them


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if path := os.environ.get("AUDIT_TABLE"):
        tests = [*dict.fromkeys(test for row in ERRORS.values() for test in row)]
        rows = [["kind", *tests], ["---"] * (len(tests) + 1)]
        rows += [[kind, *(f"{row[x]:.1e}" if x in row else "" for x in tests)] for kind, row in ERRORS.items()]
        Path(path).write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")


def noted(kind, test, error):
    """Keep the largest error of a test for the table; returns this one."""
    ERRORS[kind][test] = max(ERRORS[kind].get(test, 0.0), float(error))
    return error


def write_artifact(folder, tokenizer, size):
    """An artifact with random weights in `folder`, for a tokenizer of `size` pieces: (its path, its settings)."""
    cfg = t.Config.from_env({**SMOKE, "TOKENIZER_PATH": str(tokenizer), "VOCAB_SIZE": str(size)} | t.as_env(SHARED))
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    path, tensors = folder / "model.ptz", coded(weights, t.quant_specs(model, cfg), cfg)
    t.write_file(path, t.pack(tensors, False, cfg))
    t.write_file(artifact_of("apart", path), t.pack(tensors, False, dataclasses.replace(cfg, document_attention=True)))
    return path, cfg


def artifact_of(kind, path):
    return path.with_stem("apart") if kind == "apart" else path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(artifact, tokenizer) of a language of 10 pieces, so that a sum over all of them is a few runs."""
    folder = tmp_path_factory.mktemp("audit")
    words = iter(["ab ba cab abba", "bad cab dab ad", "a b c d"] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=str(folder / "tiny"), vocab_size=V, model_type="bpe",
                                             pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    tokenizer = folder / "tiny.model"
    return write_artifact(folder, tokenizer, V)[0], tokenizer


def stream(length=N, seed=0):
    """Random tokens (length,) with documents that begin at FIRSTS."""
    tokens = np.random.default_rng(seed).integers(2, V, length)
    tokens[[i for i in FIRSTS if i < length]] = t.BOS
    return tokens


@pytest.fixture
def nll_of(tiny):
    """(kind, tokens, changed options) -> nll of each target, or another column of the audit."""
    def score(kind, tokens, column="nll", **changes):
        return audit(artifact_of(kind, tiny[0]), tokens, tokenizer_path=str(tiny[1]), **KINDS[kind] | changes)[column]

    return score


# ---- the three checks that catch cheats: each returns its largest error

def future(score, positions):
    """H1: another token at p may change no score of a target before p."""
    base, worst = score(stream()), 0.0
    for p in positions:
        tokens = stream()
        tokens[p] = 2 + (tokens[p] + 5) % (V - 2)
        after = score(tokens)
        worst = max(worst, float(np.abs(after[: p - 1] - base[: p - 1]).max(initial=0)))
        assert after[p - 1] != base[p - 1]
    return worst


def truncation(score, lengths):
    """H2: the first tokens alone have the scores that they have in the whole stream."""
    base = score(stream())
    return max(float(np.abs(score(stream()[:length]) - base[: length - 1]).max()) for length in lengths)


def substitution(score, positions):
    """H3: the probabilities of all tokens at a position sum to 1. The stream goes on behind it."""
    worst = 0.0
    for p in positions:
        total = 0.0
        for token in range(V):
            tokens = stream()
            tokens[p] = token
            total += np.exp(-score(tokens)[p - 1])
        worst = max(worst, abs(total - 1))
    return worst


INSIDE = [p for p in range(1, N) if p not in FIRSTS]  # tokens that may change and leave the documents where they are


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_future_changes_no_earlier_score(nll_of, kind):
    """Bit for bit, at the borders of chunks, windows and documents."""
    positions = [p for p in INSIDE if p in (8, 16, 17, 18, 24, 33, 49)]
    assert len(positions) == 7
    assert noted(kind, "H1 future", future(partial(nll_of, kind), positions)) == 0


@pytest.mark.parametrize("kind", ["pr1812", "pr490"])
def test_a_rate_over_the_streams_own_length_is_the_published_one(nll_of, kind):
    """TTT_COSINE_TOKENS=0 is that of as many targets as there are; another length is another rate."""
    published, own, longer = (nll_of(kind, stream(), ttt_cosine_tokens=n) for n in (0, N - 1, 10 * N))
    assert np.array_equal(published, own) and not np.array_equal(published, longer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_stream_has_the_scores_of_its_beginning(nll_of, kind):
    """Also where the rate falls, since it falls over a known length. Batches of other sizes round differently."""
    score = partial(nll_of, kind)
    assert noted(kind, "H2 truncation", truncation(score, (2, 16, 17, 18, 25, 34))) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_of_all_tokens_at_a_position_sum_to_one(nll_of, kind):
    """The first target of a chunk and the last of one; in a document, and where the next begins or, with another token, does not."""
    positions = (22, 40) if kind in DOCUMENTS else (17, 32)
    assert noted(kind, "H3 substitution", substitution(partial(nll_of, kind), positions)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_reported_score_is_that_of_a_distribution_over_all_tokens(nll_of, kind, monkeypatch):
    """H4: the logits of every score are those of all V tokens, and finite; each reported nll is minus a log-softmax of one of them."""
    logits, step, seen, learning = t.GPT.logits, t.Adaptation.step, [], []

    def spied(self, hidden, temperature=1.0):
        out = logits(self, hidden, temperature)
        if not learning:
            seen.append(out.detach().flatten(0, -2))
        return out

    def learn(self, *args):
        learning.append(True)
        step(self, *args)
        learning.clear()

    monkeypatch.setattr(t.GPT, "logits", spied)
    monkeypatch.setattr(t.Adaptation, "step", learn)
    nll, tokens = nll_of(kind, stream(), "experts"), stream()  # of a mixture, each expert
    rows = torch.cat(seen).double().log_softmax(-1).numpy()
    assert rows.shape[1] == V and np.isfinite(rows).all() and np.isfinite(nll).all()
    assert noted(kind, "H4 -log p", max(np.abs(rows[:, token] + loss).min() for expert in nll for token, loss in zip(tokens[1:], expert))) < 1e-6


def chunks_of(kind, length=N):
    """The chunk of each target: of the stream, or of its document."""
    size, firsts = (SHARED | KINDS[kind])["ttt_chunk_tokens"], FIRSTS if kind in DOCUMENTS else (0,)
    return [(i - max(f for f in firsts if f <= i)) // size for i in range(length - 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 17, 18, N])
def test_each_target_is_scored_once_in_its_chunk(tiny, kind, length, monkeypatch):
    """H6. Scores count up: a target that were scored twice would have a sum, and one that were not 0."""
    found = audit(artifact_of(kind, tiny[0]), stream(length), tokenizer_path=str(tiny[1]), **KINDS[kind])
    assert found["chunk"].tolist() == chunks_of(kind, length) and found["chunk"].dtype == np.int64
    experts = found.pop("experts")
    assert found.keys() == {"nll", "bytes", "chunk"} and {len(column) for column in found.values()} == {length - 1}
    assert np.array_equal(found["nll"], experts[0]) or kind == "mixture"
    assert experts.shape == (1 + len(KINDS[kind].get("ttt_expert_lrs", ())), length - 1) and np.isfinite(experts).all()
    assert found["nll"].dtype == np.float64 and (found["nll"] > 0).all()
    assert (experts == experts.astype(np.float32)).all()  # one fp32 loss each: a sum or mean of two would rarely be


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_after_the_last_score(nll_of, kind, monkeypatch):
    """H8: the state at the end is the one that gave the last score, and the file's after 0 epochs."""
    models, load, scores = [], t.load_model, []

    def digest():
        return hash(b"".join(p.detach().numpy().tobytes() for p in models[0].parameters()))

    def loaded(*args):
        models.append(load(*args))
        models[0].register_forward_hook(lambda *_: None if torch.is_grad_enabled() else scores.append(digest()))
        return models[0]

    monkeypatch.setattr(t, "load_model", loaded)
    nll_of(kind, stream())
    assert digest() == scores[-1] and (len(set(scores)) == 1) == (kind == "plain")
    assert kind in DOCUMENTS or [*dict.fromkeys(scores)] == [d for i, d in enumerate(scores) if i == 0 or d != scores[i - 1]]


# ---- without learning

@pytest.mark.parametrize("kind", LEARN)
def test_no_epochs_and_a_rate_of_zero_are_the_plain_pass(nll_of, kind):
    """At a temperature of 1. Learning itself changes nearly every score behind the first chunk and none in it. Equal bits are asked for
    where both passes multiply matrices of equal shapes, ROUNDING elsewhere.
    """
    window = KINDS[kind].get("eval_seq_len", SHARED["eval_seq_len"])
    plain, warm = nll_of("plain", stream(), eval_seq_len=window), nll_of(kind, stream())
    if kind == "apart":
        crossing, plain = plain, nll_of(kind, stream(), ttt_epochs=0)
        near = [i for i in range(FIRSTS[1], N - 1) if 0 < i - max(f for f in FIRSTS if f <= i) < 3]  # their windows begin in another one
        assert np.abs(plain[: FIRSTS[1]] - crossing[: FIRSTS[1]]).max() < ROUNDING
        assert (np.abs(plain[near] - crossing[near]) > 10 * ROUNDING).mean() > 0.7
    assert noted(kind, "0 epochs", np.abs(nll_of(kind, stream(), ttt_epochs=0) - plain).max()) < ROUNDING
    if kind == "reuse":  # with longer contexts inside of a document
        short = nll_of("document", stream(), ttt_lr=0.0, ttt_temperature=1.0, eval_seq_len=16, ttt_chunk_tokens=16)
        assert np.abs(nll_of(kind, stream(), ttt_lr=0.0) - short).max() < ROUNDING
    cold = nll_of(kind, stream(), ttt_lr=0.0)
    if kind in STREAMS:
        assert noted(kind, "rate 0", np.abs(nll_of(kind, stream(), ttt_lr=0.0, ttt_temperature=1.0) - plain).max()) < ROUNDING
    first = np.array(chunks_of(kind)) == 0
    # with documents, a rate of 0 is the frozen model without a LoRA, so its products have other shapes
    assert np.abs(warm[first] - cold[first]).max() <= ROUNDING * (kind in DOCUMENTS) and (warm[~first] != cold[~first]).mean() > 0.9


# ---- documents

@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_has_its_score_in_any_order(nll_of, kind):
    """H9. The order in a batch may change the rounding."""
    ends, order = [*FIRSTS[1:], N], [3, 0, 4, 2, 1]
    base = nll_of(kind, np.append(stream(), t.BOS))
    moved = nll_of(kind, np.concatenate([*(stream()[FIRSTS[i] : ends[i]] for i in order), [t.BOS]]))
    expected = np.concatenate([base[FIRSTS[i] : ends[i]] for i in order])
    assert noted(kind, "H9 order", np.abs(moved - expected).max()) < 2e-6


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("k", range(len(FIRSTS)))
def test_a_document_knows_nothing_of_another(nll_of, k, kind):
    """H10: all of document k replaced, every other score is the same; its own are not."""
    first, end = FIRSTS[k], [*FIRSTS[1:], N][k]
    changed = stream()
    changed[first + 1 : end] = 2 + (changed[first + 1 : end] + 5) % (V - 2)
    base, after = nll_of(kind, stream()), nll_of(kind, changed)
    other = np.ones(N - 1, dtype=bool)
    other[first:end] = False
    assert noted(kind, "H10 isolation", np.abs(after[other] - base[other]).max()) == 0
    assert end == first + 1 or (after[first : end - 1] != base[first : end - 1]).all()


# ---- bytes

ODD = ["", " ", "   a  b ", "\t\n\r\n", "e\u0301\u0308", "\U0001f99c\u200d\U0001f3fd", "\u6f22\u5b57 \uac00 \u05d0", "\u00a0\u2009x\u3000", "\ufb01\uff21",
       "a" * 99, "x\u0000y", "\ufeff\u202eabc", " ".join("word"), "\ud7ff\ue000\uffff\U0010ffff"]


@pytest.mark.parametrize("texts", ["validation", "odd"])
def test_bytes_are_those_of_the_decoded_documents(dataset, documents, tmp_path, texts):
    path, cfg = write_artifact(tmp_path, dataset["TOKENIZER_PATH"], 384)
    sp = sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    ids = [[t.BOS, *sp.encode(text)] for text in [documents[0][:900], *(ODD if texts == "odd" else [text[:300] for text in documents[1:3]])]]
    counted = audit(path, np.array(sum(ids, [])), tokenizer_path=cfg.tokenizer_path, ttt_epochs=0)["bytes"]
    of_document = np.add.reduceat(np.append(0, counted), np.cumsum([0, *map(len, ids[:-1])]))
    assert of_document.tolist() == [len(sp.decode(document[1:]).encode()) for document in ids] and counted.dtype == np.int64
    if texts == "odd":
        assert sum(map(len, ODD)) > 100 and of_document[1:].sum() > 150


# ---- cheats, each caught by the checks above and by those alone that rules.md 8.1 names

def off_by_one(monkeypatch):
    """It trains on the next target, which has no score yet."""
    honest = t.Scorer.stream_chunks

    def chunks(self, forward, stride, chunk_tokens):
        for chunk, target_index in honest(self, forward, stride, chunk_tokens):
            first = chunk.index * chunk_tokens + 1
            rows = self.tokens[first : first + chunk.inputs.numel() + 1]
            shifted = rows[:-1].view_as(chunk.inputs), rows[1:].view_as(chunk.targets)
            yield chunk if chunk.last else chunk._replace(inputs=shifted[0], targets=shifted[1]), target_index

    monkeypatch.setattr(t.Scorer, "stream_chunks", chunks)


def lower_of_two(monkeypatch):
    """The better of two temperatures, target by target."""
    honest = t.Scorer.window_losses
    monkeypatch.setattr(t.Scorer, "window_losses", lambda self, forward, firsts, count: torch.minimum(
        honest(self, forward, firsts, count), honest(self, partial(forward, temperature=2.0), firsts, count)))


def gated_by_the_target(monkeypatch):
    """Which of two distributions counts depends on the class of the target."""
    def losses(self, ids, targets, **how):
        return torch.where(targets % 2 == 0, forward(self, ids, targets, **how), forward(self, ids, targets, **how | dict(temperature=0.5)))

    forward = t.GPT.forward
    monkeypatch.setattr(t.GPT, "forward", lambda self, *args, **how: (forward if torch.is_grad_enabled() else losses)(self, *args, **how))


def two_passes(monkeypatch):
    """All is scored again with the weights of the end."""
    honest = t.Scorer.evaluate_sliding
    monkeypatch.setattr(t.Scorer, "evaluate_sliding", lambda self, forward, adapt=None: (honest(self, forward, adapt), honest(self, forward))[1])


def adapted_before_the_score(monkeypatch):
    """Each chunk is learned before the score that counts is taken."""
    def sliding(self, forward, adapt=None):
        def chunks():
            return self.stream_chunks(forward, self.cfg.eval_stride, self.cfg.ttt_chunk_tokens)

        def learned():
            for chunk, target_index in chunks():
                adapt(chunk)
                yield next(again for again, _ in chunks() if again.index == chunk.index), target_index

        return self.evaluate([(learned(), None)])

    monkeypatch.setattr(t.Scorer, "evaluate_sliding", sliding)


def slot(monkeypatch):
    """A bias of the logits is fitted to the targets that it then scores."""
    def fitted(self, ids, targets, looped=False, temperature=1.0, z_loss=0.0):
        logits, delta = self.logits(self.hidden(ids, looped)[:, -targets.size(1) :], temperature).detach(), torch.zeros(V, requires_grad=True)
        with torch.enable_grad():
            for _ in range(3):
                loss = torch.nn.functional.cross_entropy((logits + delta).flatten(0, 1), targets.flatten())
                delta = (delta - torch.autograd.grad(loss, delta)[0]).detach().requires_grad_()
        flat = torch.nn.functional.cross_entropy((logits + delta).detach().flatten(0, 1), targets.flatten(), reduction="none")
        return flat.view_as(targets)

    forward = t.GPT.forward
    monkeypatch.setattr(t.GPT, "forward", lambda self, *args, **how: (forward if torch.is_grad_enabled() else fitted)(self, *args, **how))


@pytest.mark.parametrize("cheat, caught", [
    (off_by_one, {"H3"}), (lower_of_two, {"H3"}), (gated_by_the_target, {"H3"}), (two_passes, {"H1", "H2", "H3"}),
    (adapted_before_the_score, {"H1", "H2", "H3"}), (slot, {"H1", "H2", "H3"})])
def test_a_cheat_is_caught(nll_of, cheat, caught, monkeypatch):
    cheat(monkeypatch)
    score = partial(nll_of, "sgd")
    errors = {"H1": future(score, (7, 18, 30)), "H2": truncation(score, (18, 31)), "H3": substitution(score, (17,))}
    for test, name in zip(errors, ("H1 future", "H2 truncation", "H3 substitution")):
        noted(f"cheat: {cheat.__name__}", name, errors[test])
    assert {test for test, error in errors.items() if error > 1e-4} == caught
    assert all(error < 2e-6 for test, error in errors.items() if test not in caught)


def best_expert(log_p, weights, share):
    """The expert that gives the target the highest probability."""
    return log_p.amax(-1), weights


def in_hindsight(log_p, weights, share):
    """The weights of a token have already seen it."""
    after = [mix(log_p[:, : i + 1], weights, share)[1] for i in range(log_p.size(1))]
    return (torch.stack(after, 1).log() + log_p).logsumexp(-1), after[-1]


def in_log_space(log_p, weights, share):
    """A mean of log-probabilities, which no sum over the vocabulary normalizes."""
    return log_p.mean(-1), weights


mix = t.mix


@pytest.mark.parametrize("cheat", [best_expert, in_hindsight, in_log_space])
def test_a_mixture_that_is_no_distribution_is_caught(nll_of, cheat, monkeypatch):
    monkeypatch.setattr(t, "mix", cheat)
    assert noted(f"cheat: {cheat.__name__}", "H3 substitution", substitution(partial(nll_of, "mixture"), (34, 36))) > 1e-4


# ---- several processes

def write_validation(folder, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    folder.mkdir()
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return folder


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """The environment of EVAL_ONLY runs over the stream."""
    folder = tmp_path_factory.mktemp("ranks")
    return dict(EVAL_ONLY="1", ARTIFACT=str(tiny[0]), TOKENIZER_PATH=str(tiny[1]), DATA_PATH=str(write_validation(folder / "val", stream())),
                OUTPUT_DIR=str(folder))


def several(place, processes, troubles, **how):
    """Runs of [(kind, trouble)] in `processes`: (the finished process, the AUDIT files)."""
    files = [Path(place["OUTPUT_DIR"]) / f"{processes}_{kind}_{trouble}.npz" for kind, trouble in troubles]
    plan = []
    for (kind, trouble), file in zip(troubles, files):
        own = dict(ARTIFACT=str(artifact_of(kind, Path(place["ARTIFACT"]))), AUDIT=str(file), RUN_ID=file.stem)
        plan.append([place | t.as_env(KINDS[kind]) | own, trouble])
    done = run({"PYTHONPATH": str(ROOT)}, json.dumps(plan), processes=processes, script=ROOT / "tests" / "helpers" / "audit_ranks.py", **how)
    return done, [dict(np.load(file)) for file in files if file.exists()]


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_have_the_scores_of_one_also_if_one_of_them_is_late(tiny, place, processes):
    """H7. The parameters of all ranks are equal, by their bits, after each chunk; the test would tell 1e-6 more in one of them."""
    runs = [*((kind, "") for kind in KINDS), *((kind, "late") for kind in ("sgd", "document")), ("sgd", "other")]
    done, found = several(place, processes, runs, check=False)
    differ = re.findall(r"differ:(\w+) calls:(\d+)", done.stdout)
    assert [x for x, _ in differ] == ["False"] * (len(runs) - 1) + ["True"], done.stderr
    assert all(int(calls) == 3 for (kind, _), (_, calls) in zip(runs, differ) if kind in STREAMS) and len(found) == len(runs)
    assert done.stdout.count("legal_ttt_exact") == len(runs) - 1  # the plain kind has none
    for (kind, trouble), file in list(zip(runs, found))[:-1]:
        alone = audit(artifact_of(kind, tiny[0]), stream(), tokenizer_path=str(tiny[1]), **KINDS[kind])
        assert (file["chunk"] == alone["chunk"]).all() and (file["bytes"] == alone["bytes"]).all()
        assert noted(kind, f"H7 {processes} ranks{' late' * bool(trouble)}", np.abs(file["nll"] - alone["nll"]).max()) < 1e-5


# ---- the artifact alone

GUARD = """
import os, runpy, site, sys, tempfile
here = os.path.realpath(".")
def folders(*paths):
    return tuple(p + os.sep for p in map(os.path.realpath, paths) if p != os.sep)
python = folders(sys.prefix, *site.getsitepackages())
allowed = python + folders(sys.base_prefix, *sys.path[1:], tempfile.gettempdir(), "/proc", "/dev", "/sys", "/etc", "/usr", here)
opened = set()
def guard(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(here + os.sep):
            opened.add(os.path.relpath(path, here))
        elif not path.startswith(allowed) or (path.startswith(os.environ["FORBIDDEN"]) and not path.startswith(python)):  # .venv may lie in it
            print("FORBIDDEN", path, file=sys.stderr, flush=True)
            os._exit(9)
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        print("SOCKET", args, file=sys.stderr, flush=True)
        os._exit(9)
sys.addaudithook(guard)
if "--break" in sys.argv:
    open(os.environ["FORBIDDEN"] + "/x")
sys.argv = ["train_gpt.py"]
try:
    runpy.run_path("train_gpt.py", run_name="__main__")
finally:  # it ends by sys.exit
    print("opened:" + ",".join(sorted(opened)))
"""


def isolated(folder, forbidden, *args):
    """GUARD in `folder`, without a network where this machine lets a user have that, and with an environment of its own."""
    offline = ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0 else []
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    env = dict(PATH=os.environ["PATH"], HOME=str(scratch), TMPDIR=str(scratch), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", FORBIDDEN=str(forbidden),
               EVAL_ONLY="1", ARTIFACT="model.ptz", TOKENIZER_PATH="tiny.model", DATA_PATH="val", AUDIT="audit.npz", RUN_ID="alone")
    return subprocess.run([*offline, sys.executable, "-B", "-c", GUARD, *args], cwd=folder, env=env | t.as_env(KINDS["sgd"]), capture_output=True, text=True,
                          timeout=240)


def test_the_artifact_alone_has_the_same_score(tiny, tmp_path):
    """H11: script, artifact, tokenizer and validation shard in a folder; every other file that a run opens belongs to Python or the system."""
    folder = tmp_path / "empty"
    folder.mkdir()
    for file in (ROOT / "train_gpt.py", *tiny):
        shutil.copy(file, folder)
    write_validation(folder / "val", stream())
    broken = isolated(folder, ROOT, "--break")
    assert broken.returncode == 9 and "FORBIDDEN" in broken.stderr
    done = isolated(folder, ROOT)
    assert done.returncode == 0, done.stderr
    opened = set(done.stdout.splitlines()[-1].removeprefix("opened:").split(","))
    opened -= {name for name in opened if name.endswith(".part")}  # of the audit, and those that show that outputs can be written
    assert opened == {"train_gpt.py", "model.ptz", "val/fineweb_val_000000.bin", "logs/alone.txt", "tiny.model"}
    expected = audit(tiny[0], stream(), tokenizer_path=str(tiny[1]), **KINDS["sgd"])["nll"]
    with np.load(folder / "audit.npz") as found:
        assert noted("sgd", "H11 artifact only", np.abs(found["nll"] - expected).max()) < ROUNDING
        assert finals(done.stdout)["legal_ttt"] == pytest.approx(expected.sum() / np.log(2) / found["bytes"].sum(), abs=ROUNDING)


# ---- the source, as reviewers read it (rules.md 7)

def names(node):
    """All names and attributes in a piece of source."""
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}


def lint(source):
    """The patterns of rules.md 7 that this source has, by their number."""
    tree, found = ast.parse(source), set()
    for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        words = names(f) | {a.arg for a in f.args.args}
        if "backward" in words and any(re.search(r"val(idation)?(_|$)|^stream$|^tokens$", word) for word in words - {"val_loss_every"}):
            found.add("G1")
        for loop in (n for n in ast.walk(f) if isinstance(n, (ast.For, ast.While))):
            learns = [i for i, part in enumerate(loop.body) if isinstance(part, (ast.Expr, ast.If)) and "adapt" in names(part)]
            scores = [i for i, part in enumerate(loop.body) if "nll" in names(part)]
            if learns and not (scores and max(scores) < min(learns)):
                found.add("G6")
    for n in ast.walk(tree):
        words = names(n)
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.BitXor) and any(re.match(r"tgt|target|y$", word) for word in words):
            found.add("G3")
        if isinstance(n, ast.Call) and any(k.arg == "requires_grad" for k in n.keywords):
            found.add("G4")
        if isinstance(n, ast.Call) and {"min", "minimum", "amin", "fmin"} & names(n.func) and any(re.search(r"nll|loss|score|bpb", w) for w in words):
            found.add("G5")
        if isinstance(n, (ast.Assign, ast.AugAssign)):
            places = n.targets if isinstance(n, ast.Assign) else [n.target]
            if any(re.search(r"temp(erature)?$", word, re.I) for place in places for word in names(place)):
                found.add("G5")
    if re.search(r"encode\([^()]*\)\) *\+ *1", source) or ("is_byte" in source and "is_unused" not in source):
        found.add("G7")
    return found


@pytest.mark.parametrize("source, rule", [
    ("def ttt_adapt(val_tokens):\n    for e in range(3):\n        loss(val_tokens).backward()", "G1"),
    ("def f(chunks):\n    for c in chunks:\n        adapt(c)\n        total += c.nll", "G6"),
    ("key = (ctx ^ (target * prime)) & mask", "G3"), ("delta = torch.zeros(9, requires_grad=True)", "G4"),
    ("best = min(nll_a, nll_b)", "G5"), ("best = torch.minimum(first.nll, again.nll)", "G5"), ("cfg.temperature = search(bpb)", "G5"),
    ("base = len(piece.encode('utf-8')) + 1", "G7"), ("b = sp.is_byte(i)", "G7")])
def test_the_lint_finds_what_reviewers_look_for(source, rule):
    assert lint(source) == {rule}


def test_the_source_has_no_pattern_that_reviewers_flag():
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert lint(source) == set()
    parts = "class Scorer:", "@torch.no_grad()\n    def window_losses", "class Adaptation:", ".sum().backward()\n        self.ranks"
    order = [source.index(part) for part in parts]
    assert order == sorted(order)


@pytest.mark.parametrize("python", ["python3.10", "python3.11", "python3.12", "python3.13"])
def test_it_compiles_on_every_supported_python_here(python):
    """With the real compiler: an f-string that nests its own quotes is an error before 3.12 alone (G9)."""
    if subprocess.run(["sh", "-c", f"{python} -V"], capture_output=True).returncode:
        pytest.skip(f"there is no {python} here")
    code = "import sys; compile(open(sys.argv[1], encoding='utf-8').read(), 'train_gpt.py', 'exec')"
    assert subprocess.run([python, "-c", code, str(ROOT / "train_gpt.py")], capture_output=True, text=True).stderr == ""


# ---- the tool

@pytest.mark.parametrize("name, targets, size, whole", [
    ("fineweb10B_sp8192", 40_540_802, 151_080_891, True), ("fineweb10B_sp8192", 40_540_160, 151_078_200, False),
    ("fineweb10B_sp8192", 40_540_802, 151_080_892, False), ("fineweb10B_sp1024", 62_021_632, 151_080_354, True),
    ("fineweb10B_sp1024", 62_021_632, 151_120_000, False), ("fineweb10B_sp4096", 45_508_608, 151_074_062, True)])
def test_the_contests_stream_is_known_by_its_counts(name, targets, size, whole):
    """Counts of rules.md 4: sp8192 whole, the others without the tail that the published logs leave out."""
    assert SPLITS[name].matches(targets, size) is whole


def test_the_file_alone_gives_the_score_again(env, tmp_path):
    out = run(env | dict(AUDIT=str(tmp_path / "audit.npz"), ITERATIONS="2")).stdout
    said = report(tmp_path / "audit.npz")
    found = dict(part.split(":", 1) for part in said.split()[:5])
    assert f"legal_ttt_exact val_loss:{found['val_loss']} val_bpb:{found['val_bpb']}" in out and said.endswith("stream:none of the contest")
    assert re.search(rf" targets:{found['targets']} val_split_targets:\d+ bytes:{found['bytes']}$", out, re.M)
    (tmp_path / "other.npz").write_bytes(b"no file of numpy's")
    for name in ("other.npz", "missing.npz"):
        with pytest.raises(t.InputError, match=f"{name} is no file of AUDIT="):
            report(tmp_path / name)
