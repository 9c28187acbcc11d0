"""The training step of `card` in plain PyTorch: the baseline of tools.bench and a reference in tests.

Eager, with autocast where the script trains in bf16; one Newton-Schulz iteration per matrix; all logits at once;
torch's AdamW. Parameters have the names that they have in train_gpt.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt as t
from tools.files import Refused

SIZES = "num_layers model_dim num_heads num_kv_heads mlp_mult rope_base rope_dims xsa_last_n bigram_vocab_size "
SIZES += "bigram_dim ve_dim ve_layers logit_softcap mlp_negative_slope variant seed vocab_size"
RULES = "grad_clip_norm averaging decoder_lr_mult muon_row_normalize muon_wd_mlp"


def check(cfg: t.Config) -> None:
    """Raises Refused unless the settings are those of `card`, in any size."""
    for name in (*(cfg.group("model").keys() - set(SIZES.split())), *RULES.split()):
        if vars(cfg)[name] != vars(t.Config())[name]:
            raise Refused(f"the plain step implements `card` in any size, but not {name.upper()}={vars(cfg)[name]}")


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1.1920929e-07)


def rotate(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotates the first `dims` channels of x (B, H, T, C) in pairs (j, j + dims/2) by position * base**(-2j/dims)."""
    position, j = (torch.arange(n, dtype=torch.float64, device=x.device) for n in (x.size(2), dims // 2))
    angle = position[:, None] * base ** (-2 * j / dims)
    cos, sin, (a, b) = angle.cos().float(), angle.sin().float(), x[..., :dims].chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., dims:]), dim=-1).to(x.dtype)


def attention(w: dict[str, Tensor], cfg: t.Config, layer: int, x: Tensor, value_embedding: Tensor | None) -> Tensor:
    name, groups = f"blocks.{layer}.attn.", cfg.num_heads // cfg.num_kv_heads
    q, k, v = (F.linear(x, w[f"{name}{part}.weight"]) for part in ("c_q", "c_k", "c_v"))
    v = v if value_embedding is None else v + value_embedding
    q, k, v = (u.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2) for u in (q, k, v))
    q, k = (rotate(rms_norm(u), cfg.rope_dims or cfg.head_dim, cfg.rope_base) for u in (q, k))
    q, k, v = q * w[f"{name}q_gain"][:, :, None], k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
    if layer >= cfg.num_layers - cfg.xsa_last_n:
        unit = F.normalize(v, dim=-1)
        y = y - (y * unit).sum(-1, keepdim=True) * unit
    return F.linear(y.transpose(1, 2).flatten(2), w[f"{name}proj.weight"])


def loss(w: dict[str, Tensor], cfg: t.Config, ids: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats, for ids and targets (B, T)."""
    first, last_bucket = ids == t.BOS, cfg.bigram_vocab_size - 1
    pair = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last_bucket
    buckets = F.pad(pair.masked_fill(first[:, 1:], last_bucket), (1, 0), value=last_bucket)
    bigram = w["bigram.scale"] * F.linear(w["bigram.embed.weight"][buckets], w["bigram.proj.weight"])
    x = rms_norm(w["tok_emb.weight"][ids] + bigram)
    prev = torch.cat((x[:, :1], x[:, :-1]), dim=1).where(~first[..., None], x)
    x = x0 = torch.lerp(x, prev, w["smear.gate"].sigmoid())
    values = w["value_embed.scale"] * F.linear(w["value_embed.embed.weight"][ids], w["value_embed.proj.weight"])
    half, skips = cfg.num_layers // 2, []
    for i in range(cfg.num_layers):
        block, depth = f"blocks.{i}.", (i + 1) ** -0.5
        if i >= half and skips:
            x = x + w["skip_weights"][i - half] * skips.pop()
        x = w[f"{block}resid_mix"][0] * x + w[f"{block}resid_mix"][1] * x0
        value_embedding = w[f"value_embed.layer_scales.{i}"] * values if i in cfg.ve_layers else None
        x = x + w[f"{block}attn_scale"] * attention(w, cfg, i, depth * rms_norm(x), value_embedding)
        h = F.leaky_relu(F.linear(depth * rms_norm(x), w[f"{block}mlp.fc.weight"]), cfg.mlp_negative_slope) ** 2
        x = x + w[f"{block}mlp_scale"] * F.linear(h, w[f"{block}mlp.proj.weight"])
        skips += [x] * (i < half)
    logits = cfg.logit_softcap * torch.tanh(F.linear(rms_norm(x), w["tok_emb.weight"]).float() / cfg.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    x = (g.T if g.size(0) > g.size(1) else g) / (g.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if g.size(0) > g.size(1) else x


class Step:
    """Optimizer steps from the weights `state`: clip, Muon, AdamW, EMA."""

    def __init__(self, cfg: t.Config, state: dict[str, Tensor], device: torch.device):
        self.cfg, self.dtype = cfg, t.compute_dtype(cfg, device)
        self.weights = {name: w.detach().clone().requires_grad_() for name, w in state.items()}
        self.average = {name: w.detach().clone() for name, w in state.items()}
        kinds: dict[str, list[Tensor]] = dict(table=[], matrix=[], scalar=[])
        for name, w in self.weights.items():
            table, matrix = name.endswith(("tok_emb.weight", "embed.weight")), name.endswith(".weight")
            kinds["table" if table else "matrix" if matrix else "scalar"].append(w)
        self.matrices, self.momentum = kinds["matrix"], [torch.zeros_like(w) for w in kinds["matrix"]]
        decays = dict(table=cfg.embed_wd, scalar=cfg.adam_wd)
        groups = [dict(params=kinds[kind], weight_decay=decay) for kind, decay in decays.items()]
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)

    def __call__(self, ids: Tensor, targets: Tensor, scale: float, momentum: float) -> Tensor:
        """Takes one step at `scale` times the peak rates and returns the loss before it."""
        cfg, rate = self.cfg, scale * self.cfg.matrix_lr
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            before = loss(self.weights, cfg, ids, targets)
        before.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), cfg.grad_clip_norm)
        for group, peak in zip(self.adam.param_groups, (cfg.tied_embed_lr, cfg.scalar_lr)):
            group["lr"] = scale * peak
        self.adam.step()
        with torch.no_grad():
            for p, buffer in zip(self.matrices, self.momentum):
                buffer.mul_(momentum).add_(p.grad)
                update = newton_schulz((p.grad + momentum * buffer).to(self.dtype), cfg.muon_backend_steps)
                p.mul_(1 - rate * cfg.muon_wd).add_(update, alpha=-rate * max(1.0, p.size(0) / p.size(1)) ** 0.5)
            for name, p in self.weights.items():
                self.average[name].lerp_(p, 1 - cfg.ema_decay)
                p.grad = None
        return before.detach()
