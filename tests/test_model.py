import dataclasses
import math
import sys
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import make_model
from helpers.smoke import SMOKE
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as t
from tools.bench import anatomy


def ids_of(cfg, rows=2, length=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, cfg.vocab_size, (rows, length), generator=draw)
    ids[:, 0] = ids[0, 9] = t.BOS
    return ids


def reference_losses(model, cfg, ids, targets):
    """components.md section 4 in float64, position by position and head by head; shares no code with the model."""
    p = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
    heads, groups, width = cfg.num_heads, cfg.num_heads // cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
    rotated = cfg.rope_dims

    def rms(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)

    def rope(x, position):
        out = x.copy()
        for j in range(rotated // 2):
            angle = position * cfg.rope_base ** (-2 * j / rotated)
            a, b = x[j], x[j + rotated // 2]
            out[j], out[j + rotated // 2] = a * np.cos(angle) + b * np.sin(angle), -a * np.sin(angle) + b * np.cos(angle)
        return out

    def attention(x, i, extra):
        w = {k: p[f"blocks.{i}.attn.{k}"] for k in ("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "q_gain")}
        q, k, v = x @ w["c_q.weight"].T, x @ w["c_k.weight"].T, x @ w["c_v.weight"].T + extra
        out = np.zeros_like(q)
        for h in range(heads):
            own, kv = slice(h * width, h * width + width), slice(h // groups * width, h // groups * width + width)
            qh = np.stack([rope(rms(row), pos) * w["q_gain"][h] for pos, row in enumerate(q[:, own])])
            kh = np.stack([rope(rms(row), pos) for pos, row in enumerate(k[:, kv])])
            for pos in range(len(x)):
                score = qh[pos] @ kh[: pos + 1].T / np.sqrt(width)
                share = np.exp(score - score.max())
                y = share / share.sum() @ v[: pos + 1, kv]
                if i >= cfg.num_layers - cfg.xsa_last_n:
                    direction = v[pos, kv] / np.linalg.norm(v[pos, kv])
                    y = y - (y @ direction) * direction
                out[pos, own] = y
        return out @ w["proj.weight"].T

    losses = []
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        x = []
        for pos, token in enumerate(row):
            first = pos == 0 or token == t.BOS
            bucket = cfg.bigram_vocab_size - 1 if first else (36313 * token ^ 27191 * row[pos - 1]) % (cfg.bigram_vocab_size - 1)
            x.append(rms(p["tok_emb.weight"][token] + p["bigram.scale"] * (p["bigram.proj.weight"] @ p["bigram.embed.weight"][bucket])))
        gate = 1 / (1 + np.exp(-p["smear.gate"]))
        x = np.stack([v if pos == 0 or row[pos] == t.BOS else (1 - gate) * v + gate * x[pos - 1] for pos, v in enumerate(x)])
        shared = p["value_embed.scale"] * (p["value_embed.embed.weight"][row] @ p["value_embed.proj.weight"].T)
        x0, kept = x, []
        for i in range(cfg.num_layers):
            if i >= cfg.num_layers // 2 and kept:
                x = x + p["skip_weights"][i - cfg.num_layers // 2] * kept.pop()
            mix, scale = p[f"blocks.{i}.resid_mix"], 1 / np.sqrt(i + 1)
            x = mix[0] * x + mix[1] * x0
            extra = p[f"value_embed.layer_scales.{i}"] * shared if i in cfg.ve_layers else 0.0
            x = x + p[f"blocks.{i}.attn_scale"] * attention(rms(x) * scale, i, extra)
            u = rms(x) * scale @ p[f"blocks.{i}.mlp.fc.weight"].T
            u = np.where(u > 0, u, 0.5 * u) ** 2
            x = x + p[f"blocks.{i}.mlp_scale"] * (u @ p[f"blocks.{i}.mlp.proj.weight"].T)
            if i < cfg.num_layers // 2:
                kept.append(x)
        logits = 30 * np.tanh(rms(x) @ p["tok_emb.weight"].T / 30)
        shifted = logits - logits.max(-1, keepdims=True)
        log_z = np.log(np.exp(shifted).sum(-1))
        losses.append([z - s[w] for z, s, w in zip(log_z, shifted, wanted)])
    return np.array(losses)


@pytest.mark.parametrize("layers, value_layers", [(4, (2, 3)), (5, (0, 4))])
def test_the_loss_is_that_of_a_float64_reference(cfg, layers, value_layers):
    cfg = dataclasses.replace(cfg, num_layers=layers, ve_layers=value_layers)
    model, ids = make_model(cfg), ids_of(cfg)
    targets = ids_of(cfg, seed=1)
    expected = reference_losses(model, cfg, ids, targets)
    assert np.abs(model(ids, targets).detach().numpy() - expected).max() < 2e-4
    assert np.abs(model.double()(ids, targets).detach().numpy() - expected).max() < 2e-3  # activations stay fp32


def test_a_changed_token_changes_no_earlier_logit(cfg):
    model, ids = make_model(cfg), ids_of(cfg, rows=1)
    base = model.logits(model.hidden(ids))
    for position in (1, 9, 15, 23):
        changed = ids.clone()
        changed[0, position] = 2 + (ids[0, position] + 5) % (cfg.vocab_size - 2)
        logits = model.logits(model.hidden(changed))
        assert torch.equal(logits[0, :position], base[0, :position])
        assert not torch.equal(logits[0, position], base[0, position])


def test_rotary_tables_are_exact_and_have_as_many_rows_as_positions():
    cos, sin = t.rotary_tables(2048, 16, 10_000.0)
    rows = torch.cat((cos, sin), -1).flatten(1)
    assert cos.dtype == torch.float32 and len(torch.unique(rows, dim=0)) == 2048
    angles = np.outer(np.arange(2048), 10_000.0 ** (-np.arange(0, 16, 2) / 16))
    assert np.abs(cos[:, 0].numpy() - np.cos(angles)).max() < 1e-7 and np.abs(sin[:, 0].numpy() - np.sin(angles)).max() < 1e-7
    model = t.GPT(t.Config(num_layers=2, ve_layers=(), xsa_last_n=0), dtype=torch.bfloat16)
    assert len(torch.unique(torch.cat((*model.rotary,), -1).flatten(1), dim=0)) == 2048


def test_a_window_longer_than_the_training_rows_has_its_rotations(cfg):
    model, longer = (make_model(dataclasses.replace(cfg, eval_seq_len=n)) for n in (0, 64))
    ids = torch.randint(2, cfg.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert longer.hidden(ids).shape == (2, 64, cfg.model_dim)
        torch.testing.assert_close(longer.hidden(ids)[:, :32], model.hidden(ids[:, :32]), rtol=1e-4, atol=1e-4)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = t.rotary_tables(64, 8, 10_000.0)
    x = torch.randn(1, 1, 1, 8).expand(1, 64, 1, 8)
    q, k = t.rotate(x, cos, sin)[0, :, 0], t.rotate(x.flip(-1), cos, sin)[0, :, 0]
    torch.testing.assert_close(q.norm(dim=-1), x[0, :, 0].norm(dim=-1))
    products = q @ k.T
    torch.testing.assert_close(products[10:, 10:], products[:-10, :-10], rtol=1e-4, atol=1e-4)


def test_an_exclusive_head_is_orthogonal_to_its_tokens_value():
    y, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)
    out = t.exclude_own_value(y, v)
    assert (out * v.repeat_interleave(2, dim=2)).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(t.exclude_own_value(out, v), out)
    torch.testing.assert_close(t.exclude_own_value(y, v * 1e-6), out)  # only the direction of v matters
    assert torch.equal(t.exclude_own_value(y, torch.zeros_like(v)), y)  # a zero vector removes nothing


@pytest.mark.parametrize("buckets, expected", [
    (2048, [2047, 1887, 144, 1150, 523]), (4096, [4095, 3892, 33, 289, 3919]), (1536, [1535, 892, 218, 1044, 989])])
def test_bigram_buckets_are_the_published_ones(buckets, expected):
    bigram = t.BigramHashEmbedding(t.Config(bigram_vocab_size=buckets))
    assert bigram.bucket(torch.tensor([[1, 5, 9, 1023, 700]])).tolist() == [expected]
    assert bigram.bucket(torch.tensor([[7, 5, 9, t.BOS, 700]]))[0, [0, 3]].tolist() == [buckets - 1] * 2


def test_smear_gate_and_bigram_do_not_see_the_document_before(cfg):
    model, ids = make_model(cfg), ids_of(cfg, rows=1)
    changed = ids.clone()
    changed[0, 8] = 2 + (ids[0, 8] + 1) % (cfg.vocab_size - 2)  # the token before a BOS
    x = torch.randn(1, 24, cfg.model_dim)
    y = x.clone()
    y[0, 8] += 1
    assert torch.equal(model.smear(x, ids)[0, 9:], model.smear(y, ids)[0, 9:])
    assert not torch.equal(model.smear(x, ids)[0, 8], model.smear(y, ids)[0, 8])
    assert torch.equal(model.bigram(ids, model.dtype)[0, 9:], model.bigram(changed, model.dtype)[0, 9:])


def losses(cfg, model):
    return model(ids_of(cfg), ids_of(cfg, seed=1))


def transplanted(cfg, **changes):
    """Losses of a model with changed options that shares, by name, the weights of `make_model(cfg)`."""
    changed = dataclasses.replace(cfg, **changes)
    model = t.GPT(changed)
    model.load_state_dict(make_model(cfg).state_dict(), strict=False)
    return losses(changed, model)


def test_scales_of_outputs_are_folded_into_weights_or_multiplied_after_an_output_hook():
    linear, x, scale = t.Linear(24, 16), torch.randn(8, 24), torch.randn(16, requires_grad=True)
    torch.nn.init.normal_(linear.weight)
    seen, plain = [], (x.double() @ linear.weight.double().T).detach()
    for linear.output_hook in (None, lambda x, y: seen.append(y) or y + 1):
        y, unscaled = linear(x, scale), plain + (linear.output_hook is not None)
        torch.testing.assert_close(y, (scale.double() * unscaled).float())
        torch.testing.assert_close(linear(x), unscaled.float())
        for p, gradient in ((scale, unscaled.sum(0)), (linear.weight, torch.outer(scale, x.sum(0)))):
            torch.testing.assert_close(torch.autograd.grad(y.sum(), p, retain_graph=True)[0], gradient.float())
    torch.testing.assert_close(seen[0], plain.float())  # the hook sees the output before the scale


def test_a_scaled_weight_is_rounded_to_the_dtype_of_the_input_once():
    linear, x, scale = t.Linear(24, 16), torch.randn(8, 24).bfloat16(), torch.randn(16)
    torch.nn.init.normal_(linear.weight)
    assert torch.equal(linear(x, scale), F.linear(x, (torch.diag(scale) @ linear.weight).bfloat16()))
    assert torch.equal(linear(x), F.linear(x, linear.weight.bfloat16()))


def test_small_tables_are_projected_in_the_dtype_of_activations(cfg):
    cfg = dataclasses.replace(cfg, bigram_vocab_size=64, bigram_dim=8, ve_layers=(1,), ve_dim=8)
    model, seen = t.GPT(cfg, dtype=torch.bfloat16), []
    model.init_weights(cfg)
    for proj in (model.bigram.proj, model.value_embed.proj):
        proj.register_forward_hook(lambda module, args, y: seen.extend((args[0].dtype, y.dtype)))
    model.hidden(torch.randint(2, cfg.vocab_size, (1, 32)))
    assert seen == [torch.bfloat16] * 4


def test_heads_of_linears_by_one_product_are_those_of_each():
    linears, x = [t.Linear(24, rows).double() for rows in (16, 8, 8)], torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    for linear in linears:
        torch.nn.init.normal_(linear.weight)
    wanted = [x @ linear.weight.T for linear in linears]
    linears[1].output_hook = lambda x, y: 2 * y + x[..., :8]
    wanted[1] = 2 * wanted[1] + x[..., :8]
    with anatomy.Recorder("cpu") as recorder:
        outputs = t.project_heads(x, 4, *linears)
    assert [e.flops for e in recorder.take() if e.kind == "product"] == [2 * 10 * 24 * 32]  # one, for all of them
    for ours, alone, linear in zip(outputs, wanted, linears):
        assert ours.shape[2:] == (len(linear.weight) // 4, 4)
        torch.testing.assert_close(ours.flatten(2), alone)
        for p in (x, linear.weight):
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0] for y in (ours, alone)))


@pytest.mark.parametrize("dtype, digits", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_norm_is_that_of_torch_times_the_scale(dtype, digits):
    x = torch.randn(4, 6, 32, dtype=torch.float64).mul(torch.logspace(-4, 4, 6)[:, None]).to(dtype).requires_grad_()
    scale, gradient = torch.randn(6, 1), torch.randn(4, 6, 32).to(dtype)
    ours, wanted = t.norm(x, scale), (F.rms_norm(x.double(), (32,), eps=1.1920929e-07) * scale)
    assert ours.dtype == dtype
    for a, b in ((ours, wanted), *zip(torch.autograd.grad(ours, x, gradient), torch.autograd.grad(wanted, x, gradient.double()))):
        assert (a - b).norm() <= digits * b.norm()
    assert not t.norm(torch.zeros(3, 8, dtype=dtype)).any()


def test_neutral_values_leave_the_maths_bit_identical(cfg, monkeypatch):
    """ROPE_DIMS = head width is plain RoPE; slope 0 is ReLU squared; power 0, XSA 0 and eval length = train length do nothing."""
    assert torch.equal(transplanted(cfg, rope_dims=0), transplanted(cfg, rope_dims=cfg.head_dim))
    assert torch.equal(transplanted(cfg, eval_seq_len=0), transplanted(cfg, eval_seq_len=cfg.train_seq_len))
    flat = transplanted(cfg, ln_scale_power=0.0, mlp_negative_slope=0.0, xsa_last_n=0)
    monkeypatch.setattr(t.MLP, "forward", lambda self, x, scale: self.proj(F.relu(self.fc(x)).square(), scale))
    monkeypatch.setattr(t, "exclude_own_value", None)
    unscaled = t.Block.__init__

    def without_scale(self, *args):
        unscaled(self, *args)
        self.input_scale = torch.tensor(1.0)

    monkeypatch.setattr(t.Block, "__init__", without_scale)
    assert torch.equal(transplanted(cfg, xsa_last_n=0), flat)


@pytest.mark.parametrize("off, zeroed", [
    (dict(bigram_vocab_size=0), "bigram.scale"), (dict(ve_layers=()), "value_embed.scale"), (dict(smear_gate=False), "smear.gate")])
def test_a_part_that_is_off_equals_one_that_contributes_nothing(cfg, off, zeroed):
    model = make_model(cfg)
    with torch.no_grad():
        model.get_parameter(zeroed).fill_(-1e9 if zeroed == "smear.gate" else 0.0)
    changed = dataclasses.replace(cfg, **off)
    without = t.GPT(changed)
    without.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(losses(cfg, model), losses(changed, without))
    assert not torch.equal(losses(cfg, make_model(cfg)), losses(changed, without))


def test_every_parameter_is_initialized_and_the_seed_decides_it(cfg, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape: torch.full(shape, math.nan))
    models = []
    for seed in (1, 1, 2):
        model = t.GPT(cfg)
        assert model.tok_emb.weight.isnan().all()
        model.init_weights(dataclasses.replace(cfg, seed=seed))
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert models[0].isfinite().all()
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_initial_weights_are_the_published_ones(cfg):
    cfg = dataclasses.replace(cfg, model_dim=64, num_heads=4, rope_dims=16)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    p = dict(model.named_parameters())
    eye = torch.eye(64)
    torch.testing.assert_close(p["blocks.1.attn.c_q.weight"] @ p["blocks.1.attn.c_q.weight"].T, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(p["blocks.1.mlp.fc.weight"].T @ p["blocks.1.mlp.fc.weight"], eye, atol=1e-5, rtol=0)
    singular = torch.linalg.svdvals(p["bigram.proj.weight"])
    torch.testing.assert_close(singular, torch.full_like(singular, 1 / np.sqrt(2 * cfg.num_layers)))
    assert abs(p["tok_emb.weight"].std() / 0.005 - 1) < 0.05 and abs(p["value_embed.embed.weight"].std() / 0.01 - 1) < 0.1
    for name in ("blocks.0.attn.proj.weight", "blocks.0.mlp.proj.weight", "bigram.embed.weight", "smear.gate"):
        assert not p[name].any()
    assert (p["blocks.0.attn.q_gain"] == 1.5).all() and p["bigram.scale"] == 0.05 and p["value_embed.scale"] == 0.1
    assert torch.equal(p["blocks.2.resid_mix"], torch.stack((torch.ones(64), torch.zeros(64))))
    assert (p["skip_weights"] == 1).all() and (p["value_embed.layer_scales.2"] == 1).all()


def test_the_first_loss_is_that_of_a_uniform_guess():
    cfg = t.Config.from_env(SMOKE)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    ids = torch.randint(2, 1024, (8, 32), generator=torch.Generator().manual_seed(0))
    assert abs(model(ids, (ids + 7) % 1024).mean() - np.log(1024)) < 0.01


def test_roles_divide_the_parameters(cfg):
    roles = t.parameter_roles(t.GPT(cfg))
    assert {name for name, role in roles.items() if role == "table"} == {"tok_emb.weight", "bigram.embed.weight", "value_embed.embed.weight"}
    matrices = [name for name, role in roles.items() if role == "matrix"]
    assert len(matrices) == 6 * cfg.num_layers + 2 and all(name.endswith(".weight") for name in matrices)
    assert roles["blocks.0.resid_mix"] == roles["skip_weights"] == roles["blocks.0.attn.q_gain"] == "scalar"


def test_bf16_activations_stay_close_to_fp32(cfg):
    model, half = make_model(cfg), t.GPT(cfg, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert (losses(cfg, model).mean() - losses(cfg, half).mean()).abs() < 0.1


def test_a_kernel_that_is_set_by_name_must_be_there():
    assert t.choose_attention(t.Config(), t.Ranks()) == ("sdpa", t.attend_sdpa, [])
    for name, words in dict(fa3="fa3: it needs a GPU", fa2="fa2: it needs a GPU").items():
        with pytest.raises(t.InputError, match=f"ATTENTION={name} cannot run: .*{words}.*set ATTENTION=auto"):
            t.choose_attention(t.Config(attention=name), t.Ranks())


@pytest.fixture
def card(monkeypatch):
    """Stand-ins for a GPU of `capability` and for both FlashAttention packages; `chosen(**options)` returns the Attention."""
    card = SimpleNamespace(capability=(9, 0), ranks=t.Ranks(device=torch.device("cuda", 0)), calls=[])
    for module, namespace in t.FLASH_PACKAGES.values():
        package = ModuleType(module)
        package.flash_attn_func = lambda q, k, v, module=module, **how: (card.calls.append((module, how)), q)[1]
        package.flash_attn_varlen_func = lambda q, *rest, module=module, **how: (card.calls.append((module, rest[2:], how)), q)[1]
        monkeypatch.setitem(sys.modules, module, package)
        monkeypatch.setattr(torch.ops, namespace, SimpleNamespace(_flash_attn_forward=None), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    card.chosen = lambda **options: t.choose_attention(t.Config(**options), card.ranks)
    return card


def test_on_a_gpu_auto_takes_the_best_kernel_that_is_there_and_a_name_that_kernel(card, monkeypatch):
    q = torch.randn(1, 3, 2, 64)
    for name, module in dict(auto="flash_attn_interface", fa3="flash_attn_interface", fa2="flash_attn").items():
        found = card.chosen(attention=name)
        assert torch.equal(found.attend(q, q, q), q) and card.calls.pop() == (module, dict(softmax_scale=None, causal=True))
        assert found.name == dict(auto="fa3").get(name, name) and found.warnings == []
    assert card.chosen(attention="sdpa")[:2] == ("sdpa", t.attend_sdpa)
    card.capability = (8, 0)
    assert card.chosen()[::2] == ("fa2", ["attention by fa2, without fa3: it needs a Hopper GPU"])
    with pytest.raises(t.InputError, match="ATTENTION=fa3 cannot run: fa3: it needs a Hopper GPU"):
        card.chosen(attention="fa3")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert card.chosen().name == "sdpa" and "fa3: it needs a Hopper GPU; fa2: import of flash_attn" in card.chosen().warnings[0]
    card.capability = (9, 0)
    with pytest.raises(t.InputError, match="ATTENTION=fa2 cannot run: fa2: .*flash_attn"):
        card.chosen(attention="fa2")
    assert card.chosen(dtype="fp32").name == "sdpa"


@pytest.mark.parametrize("fault", [ImportError("no module"), OSError("libcudart.so.12: cannot open\nshared object"), RuntimeError("undefined symbol"),
                                   AttributeError("no flash_attn_func")])
def test_a_broken_package_is_a_missing_one_and_the_log_says_why(card, monkeypatch, fault):
    real = t.importlib.import_module

    def fail(name):
        if name == "flash_attn_interface":
            raise fault
        return real(name)

    monkeypatch.setattr(t.importlib, "import_module", fail)
    found = card.chosen()
    (warning,) = found.warnings
    assert found.name == "fa2" and warning.startswith("attention by fa2, without fa3: ")
    assert str(fault).split()[0] in warning and "\n" not in warning
    with pytest.raises(t.InputError, match=f"ATTENTION=fa3 cannot run: fa3: .*{str(fault).split()[0]}"):
        card.chosen(attention="fa3")


def test_a_flash_attention_that_torch_compile_cannot_trace_is_not_used(card, monkeypatch):
    """Packages from before 2025-11 register no operator with a fake kernel, so a fullgraph compilation fails."""
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace())
    assert card.chosen().name == "fa2" and "registers no operator" in card.chosen().warnings[0]
    assert card.chosen(compile="off")[::2] == ("fa3", [])
    with pytest.raises(t.InputError, match="ATTENTION=fa3 cannot run: .*install a newer version"):
        card.chosen(attention="fa3")


def naive_attention(q, k, v):
    """Causal softmax attention in float64, head by head."""
    out = torch.zeros(*q.shape[:-1], v.size(-1), dtype=torch.float64)
    for h in range(q.size(2)):
        kv = h // (q.size(2) // k.size(2))
        scores = torch.einsum("btc,bsc->bts", q[:, :, h].double(), k[:, :, kv].double()) * q.size(-1) ** -0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        out[:, :, h] = scores.softmax(-1) @ v[:, :, kv].double()
    return out


@pytest.mark.parametrize("channels", [6, 8, 60, 64])
@pytest.mark.parametrize("returned", [lambda y: y, lambda y: (y, None)])
def test_heads_of_any_width_run_through_a_kernel_for_multiples_of_8(channels, returned):
    seen = []

    def kernel(q, k, v, softmax_scale, causal):
        seen.append((q.size(-1), causal))
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=softmax_scale, enable_gqa=True)
        return returned(y.transpose(1, 2))

    q, k, v = (torch.randn(2, 9, heads, channels) for heads in (4, 2, 2))
    attend = partial(t.attend_flash, (kernel, None))
    attend, expected = partial(t.attend_padded, attend) if channels % 8 else attend, naive_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=1e-4, atol=1e-5)
    assert seen == [(-(-channels // 8) * 8, True)]


@pytest.mark.parametrize("backends", [[], [SDPBackend.MATH]], ids=str)
def test_the_attention_of_torch_is_causal_with_grouped_heads(backends):
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
    with sdpa_kernel(backends) if backends else nullcontext():
        found = t.attend_sdpa(q, k, v)
    torch.testing.assert_close(found.double(), naive_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_documents_are_masked_by_the_variable_length_kernel_of_the_best_package(card, monkeypatch):
    q, ids = torch.randn(2, 130, 2, 64), torch.full((2, 130), 5)
    ids[1, 100] = t.BOS
    documents = t.find_documents(ids)
    assert torch.equal(card.chosen(document_attention=True).attend(q, q, q, documents), q)
    module, (cu_seqlens_q, cu_seqlens_k, *longest), how = card.calls.pop()
    assert module == "flash_attn_interface" and how == dict(softmax_scale=None, causal=True) and longest == [130, 130]
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.tolist() == [*[0] * 8, 130, 230, 260]
    for module, _ in t.FLASH_PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert card.chosen(document_attention=True)[:2] == ("sdpa", t.attend_sdpa) and "without fa3" in card.chosen(document_attention=True).warnings[0]


def test_heads_of_60_channels_are_padded_on_a_gpu(card):
    attend = card.chosen(model_dim=480).attend
    assert attend.func is t.attend_padded and attend.args[0].func is t.attend_flash
    q = torch.randn(1, 3, 2, 60)
    assert torch.equal(attend(q, q, q), q) and card.calls.pop()[1] == dict(softmax_scale=60**-0.5, causal=True)


def test_the_forward_is_one_graph_that_late_qat_does_not_recompile(cfg):
    """The forward pass has no graph break, and late QAT uses the same graph. The backend `eager` needs no compiler."""
    model, ids, targets = make_model(cfg), ids_of(cfg), ids_of(cfg, seed=1)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    for wanted in (targets, targets[:, -8:]):
        torch.testing.assert_close(compiled(ids, wanted), model(ids, wanted))
    assert counter.frame_count == 2
    with t.on_export_grid(model, cfg):
        compiled(ids, targets).mean().backward()
        torch.testing.assert_close(compiled(ids, targets), model(ids, targets))
    assert counter.frame_count == 2 and all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_the_compiled_step_keeps_the_logits_once_and_in_the_dtype_of_activations():
    """With Inductor's partitioner, no fp32 logits and no softmax are saved for the backward pass."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    kept = []

    def forward_graph(graph, example):
        outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        kept.extend(n.meta["val"] for n in outputs if isinstance(n, torch.fx.Node) and n.op != "placeholder")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward_graph, bw_compiler=lambda graph, example: make_boxed_func(graph.forward),
                           partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table())
    cfg = t.Config(num_layers=2, ve_layers=(1,), xsa_last_n=1, model_dim=64, num_heads=2, num_kv_heads=1, bigram_dim=16, ve_dim=16)
    model = t.GPT(cfg, dtype=torch.bfloat16)
    model.init_weights(cfg)
    ids = ids_of(cfg, length=192)
    torch._dynamo.reset()
    forward = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    forward(ids, ids).mean().backward()
    logits = [x for x in kept if isinstance(x, torch.Tensor) and cfg.vocab_size in x.shape and x.numel() == ids.numel() * cfg.vocab_size]
    assert [x.dtype for x in logits] == [torch.bfloat16]
    wide = [tuple(x.shape) for x in kept if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= ids.numel() * cfg.model_dim]
    assert not wide, wide
    assert all(p.grad is not None for p in model.parameters())


def test_the_norm_of_bf16_is_rounded_once_at_its_end():
    x = (torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]).bfloat16()
    scale = torch.rand(64, 1) + 0.5
    assert torch.equal(t.norm(x), t.norm(x.float()).bfloat16()) and t.norm(x).dtype == torch.bfloat16
    assert torch.equal(t.norm(x, scale), t.norm(x.float(), scale).bfloat16())


@pytest.mark.parametrize("channels", [60, 6, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_padded_heads_keep_their_own_scale_under_the_attention_of_torch(channels, documents):
    q, k, v = (3 * torch.randn(2, 9, heads, channels) for heads in (4, 2, 2))
    ids, parts = torch.full((2, 9), 5), [slice(0, 9)]
    if documents:
        ids[:, 4], parts = t.BOS, [slice(0, 4), slice(4, 9)]
    found = t.attend_padded(t.attend_sdpa, q, k, v, t.find_documents(ids) if documents else None)
    expected = torch.cat([naive_attention(q[:, part], k[:, part], v[:, part]) for part in parts], 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
