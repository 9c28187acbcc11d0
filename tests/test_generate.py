"""tools.model.generate: what it draws, from what, and how it comes out."""

import dataclasses
import math

import pytest
import torch
from conftest import make_model, run
from helpers.smoke import SMOKE
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from tools.model import generate as tool

SCRIPT = "tools.model.generate"
PROMPT = "The statement of a class, "


@pytest.fixture(scope="module")
def env(dataset):
    """What a user has set: the tokenizer alone."""
    return {"TOKENIZER_PATH": dataset["TOKENIZER_PATH"]}


@pytest.fixture(scope="module")
def cfg(dataset):
    return t.Config.from_env(SMOKE | dataset)


@pytest.fixture(scope="module")
def artifact(cfg, tmp_path_factory):
    """A looped model of random weights, as a user finds it."""
    cfg, path = dataclasses.replace(cfg, num_loops=1, loop_start=1, loop_end=2), tmp_path_factory.mktemp("model") / "model.ptz"
    model = make_model(cfg)
    weights = {name: 3 * p.detach() if name == "tok_emb.weight" else p.detach() for name, p in model.named_parameters()}
    path.write_bytes(t.pack(t.quantize(weights, t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})), True, cfg))
    return path


@pytest.fixture(scope="module")
def model(artifact, env):
    return t.load_model(*t.load_artifact(artifact, env)[:2], t.Ranks())


@pytest.fixture(scope="module")
def sp(cfg):
    return t.load_tokenizer(cfg)


def arguments(*options, artifact="x.ptz", prompt=PROMPT):
    return tool.arguments([str(artifact), prompt, *map(str, options)])


def text(artifact, env, *options, prompt=PROMPT):
    """What is printed."""
    return "".join(tool.generate(arguments("--max-tokens", 24, *options, artifact=artifact, prompt=prompt), env))


@torch.no_grad()
def greedy_by_hand(model, ids, window, count):
    """The token of the least loss, of all that may follow, `count` times."""
    every, ids = torch.arange(model.tok_emb.weight.size(0))[:, None], list(ids)
    for _ in range(count):
        seen = torch.tensor(ids[-window:])
        ids.append(int(model(seen.expand(len(every), -1), every, looped=True)[:, 0].argmin()))
    return ids[-count:]


@pytest.mark.parametrize("prompt", ["", PROMPT, PROMPT * 9])
def test_greedy_takes_the_token_of_the_least_loss_in_the_last_window(artifact, env, model, sp, cfg, prompt):
    ids = [t.BOS, *sp.encode(prompt)]
    expected = greedy_by_hand(model, ids, cfg.window, 10)
    assert (len(ids) > 2 * cfg.window) == (prompt == PROMPT * 9) and t.BOS not in expected
    assert text(artifact, env, "--temperature", 0, "--max-tokens", 10, prompt=prompt) == prompt + "".join(tool.pieces(sp, expected))


def test_only_the_last_window_counts(artifact, env, sp, cfg):
    tail = " and the rest of it, which is long enough to fill the window"
    assert len(sp.encode(tail)) > cfg.window + 1
    same = {text(artifact, env, "--seed", 3, prompt=start + tail).removeprefix(start) for start in ("yes", "no, 1 2 3 4 5 6", "")}
    assert len(same) == 1
    short = {text(artifact, env, "--seed", 3, prompt=start + " it").removeprefix(start) for start in ("yes", "no, 1 2 3 4 5 6", "")}
    assert len(short) == 3


def test_a_seed_gives_one_text_and_another_seed_another(artifact, env):
    first = text(artifact, env, "--seed", 7)
    assert first == text(artifact, env, "--seed", 7) and first.startswith(PROMPT)
    assert len({first, text(artifact, env), text(artifact, env, "--seed", 8), text(artifact, env, "--seed", 2**63 - 1)}) == 4


@pytest.mark.parametrize("options", [["--top-k", 1], ["--top-k", 1, "--temperature", 5, "--seed", 3], ["--top-p", 1e-9], ["--temperature", 1e-9, "--seed", 5],
                                     ["--temperature", 5e-324]])
def test_one_candidate_is_greedy(artifact, env, options):
    assert text(artifact, env, *options) == text(artifact, env, "--temperature", 0)


def left_by_hand(logits, temperature, top_k, top_p):
    """{token: probability} of what may be drawn, in plain floats."""
    peak = max(logits)
    weights = sorted(((math.exp((x - peak) / temperature), -i) for i, x in enumerate(logits)), reverse=True)[: top_k or None]
    total, chosen = math.fsum(w for w, _ in weights), {}
    for w, i in weights:
        if chosen and math.fsum(chosen.values()) >= top_p * total * (1 + 1e-12):
            break
        chosen[-i] = w
    return {i: w / math.fsum(chosen.values()) for i, w in chosen.items()}


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.floats(-30, 30, width=16), min_size=1, max_size=12), temperature=st.floats(0.05, 4), top_k=st.integers(0, 14),
       top_p=st.floats(0.01, 1), seed=st.integers(0, 2**63 - 1))
def test_nothing_is_drawn_outside_of_top_k_and_top_p(logits, temperature, top_k, top_p, seed):
    args = arguments("--temperature", temperature, "--top-k", top_k, "--top-p", top_p)
    draw = torch.Generator().manual_seed(seed)
    drawn = {tool.choose(torch.tensor(logits), args, draw) for _ in range(10)}
    assert drawn <= left_by_hand(logits, temperature, top_k, top_p).keys()


@pytest.mark.parametrize("temperature, top_k, top_p, left", [
    (1, 0, 1, 6), (1.5, 0, 1, 6), (2, 3, 1, 3), (2, 3, 0.5, 1), (1, 0, 0.9, 3), (1, 4, 0.7, 2), (1, 5, 0.99, 5), (3, 100, 0.5, 2)])
def test_what_is_left_is_drawn_with_its_probability(temperature, top_k, top_p, left):
    logits = [2.0, 1.0, 3.0, -1.0, 0.5, 0.0]
    expected, draws = left_by_hand(logits, temperature, top_k, top_p), 2000
    args, draw = arguments("--temperature", temperature, "--top-k", top_k, "--top-p", top_p), torch.Generator().manual_seed(1)
    drawn = [tool.choose(torch.tensor(logits), args, draw) for _ in range(draws)]
    assert len(expected) == left and set(drawn) == expected.keys()
    for token, p in expected.items():
        assert drawn.count(token) / draws == pytest.approx(p, abs=4.5 * (p * (1 - p) / draws) ** 0.5), token


def test_tokens_come_one_by_one_from_a_sliding_window_until_a_document_ends():
    seen, script = [], [5, 9, 9, 2, t.BOS, 5]

    def next_logits(ids):
        seen.append(ids.tolist())
        return torch.nn.functional.one_hot(torch.tensor(script[len(seen) - 1]), 12).float()

    tokens = tool.continuation(next_logits, [t.BOS, 7, 8], 4, arguments("--temperature", 0))
    assert next(tokens) == 5 and seen == [[[1, 7, 8]]]
    assert list(tokens) == [9, 9, 2] and seen[1:] == [[[1, 7, 8, 5]], [[7, 8, 5, 9]], [[8, 5, 9, 9]], [[5, 9, 9, 2]]]
    seen.clear()
    assert list(tool.continuation(next_logits, [t.BOS], 4, arguments("--temperature", 0, "--max-tokens", 2))) == [5, 9]
    assert list(tool.continuation(next_logits, [t.BOS], 4, arguments("--max-tokens", 0))) == []


def test_the_prompt_comes_before_the_model_is_asked(artifact, env):
    assert next(tool.generate(arguments(artifact=artifact), env)) == PROMPT


@pytest.mark.parametrize("words", ["a class é東😀 of ☃", "plain words, 123", "東" * 5])
def test_characters_come_when_they_are_whole(sp, words):
    ids = sp.encode(words)
    given_out = list(tool.pieces(sp, ids))
    assert "".join(given_out) == sp.decode(ids) == words and "\ufffd" not in "".join(given_out)
    assert len(given_out) == len(ids) + 1 and (words.isascii() or any(sp.is_byte(i) and not piece for i, piece in zip(ids, given_out)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_make_a_text(sp, cfg, data):
    some_bytes = [i for i in range(384) if sp.is_byte(i)]
    ids = data.draw(st.lists(st.integers(0, 383) | st.sampled_from(some_bytes), max_size=30))
    raw = [tool.token_bytes(sp, i) for i in ids]
    assert "".join(tool.pieces(sp, ids)) == b"".join(raw).decode("utf-8", "replace")
    table, bos = t.load_byte_table(cfg), torch.tensor(t.BOS)
    for i, b in zip(ids, raw):  # the space of a piece counts where it follows no boundary
        assert len(b) == int(table.base[i]) + int(table.space[i]) and int(table.count(bos, torch.tensor(i))) == len(b.lstrip(b" ") if table.space[i] else b)


def test_a_terminal_gets_utf8_whatever_its_locale(artifact, env):
    prompt = "東 é"
    done = run(env | {"PYTHONIOENCODING": "ascii"}, str(artifact), prompt, "--max-tokens", "5", "--seed", "4", script=SCRIPT, fresh=True)
    assert done.stdout == text(artifact, env, "--max-tokens", 5, "--seed", 4, prompt=prompt) + "\n" and done.stdout.startswith(prompt) and not done.stderr


def test_the_tokenizer_must_be_the_artifacts(artifact, env, dataset, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(open(env["TOKENIZER_PATH"], "rb").read() + b"\0")
    done = run(env, str(artifact), "x", "--tokenizer", str(other), script=SCRIPT, check=False)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tools.model.generate: ") and f"TOKENIZER_PATH={other} is not the tokenizer it was trained with" in done.stderr
    assert text(artifact, {"TOKENIZER_PATH": str(other)}, "--tokenizer", env["TOKENIZER_PATH"]) == text(artifact, env)
    with pytest.raises(t.InputError, match="none.model"):
        text(artifact, {}, "--tokenizer", tmp_path / "none.model")


@pytest.mark.parametrize("damage, words", [(lambda b: b[:99], "truncated or damaged"), (lambda b: b"text", "not an artifact"), (None, "there is no artifact")])
def test_a_bad_artifact_is_told_in_one_line(artifact, env, tmp_path, damage, words):
    path = tmp_path / "bad.ptz"
    if damage:
        path.write_bytes(damage(artifact.read_bytes()))
    with pytest.raises(t.InputError, match=words) as caught:
        text(path, env)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, words", [
    (["--temperature", "-1"], "--temperature -1.0 must be in"), (["--temperature", "nan"], "--temperature nan"),
    (["--temperature", "inf"], "--temperature inf"),
    (["--top-k", "-1"], "--top-k"), (["--top-p", "0"], "--top-p"), (["--top-p", "1.5"], "--top-p"), (["--top-p", "nan"], "--top-p"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**63)], "--seed"), (["--max-tokens", "-1"], "--max-tokens")])
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(t.InputError, match=words):
        arguments(*options)


def test_a_prompt_that_is_no_utf8_is_refused():
    with pytest.raises(t.InputError, match="not UTF-8"):
        arguments(prompt="a\udcff")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    for temperature in (0, 1):
        with pytest.raises(t.InputError, match="x.ptz gives NaN or infinite logits"):
            tool.choose(torch.tensor([0.0, bad, 1.0]), arguments("--temperature", temperature), torch.Generator())
