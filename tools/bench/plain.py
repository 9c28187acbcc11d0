"""The training step of `card` in plain PyTorch: the rival in tools.bench, a reference in tests.

Eager; autocast where the training dtype is bf16; one Newton-Schulz after the other; all logits, then F.cross_entropy;
AdamW from torch.optim. Parameters have the names of train_gpt.py's, so that weights can be copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt as t

SIZES = {"num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_base", "rope_dims", "xsa_last_n",
         "bigram_vocab_size", "bigram_dim", "ve_dim", "ve_layers", "logit_softcap", "mlp_negative_slope"}
RULES = ("grad_clip_norm", "averaging", "decoder_lr_mult", "muon_row_normalize", "muon_wd_mlp")


def check(cfg: t.Config) -> None:
    """InputError if `cfg` is more than another size of `card`."""
    fixed = cfg.group("model").keys() - {"variant", "seed", "vocab_size", *SIZES}
    other = [k for k in (*fixed, *RULES) if vars(cfg)[k] != vars(t.Config())[k]]
    if other:
        raise t.InputError(f"the plain step knows `card` in any size, but not {other[0].upper()}={vars(cfg)[other[0]]}")


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1.1920929e-07)


class Bigram(nn.Module):
    def __init__(self, cfg: t.Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj, self.scale = nn.Linear(cfg.bigram_dim, cfg.model_dim, bias=False), nn.Parameter(torch.empty(()))

    def forward(self, ids: Tensor) -> Tensor:
        buckets = self.embed.num_embeddings
        hashed = torch.full_like(ids, buckets - 1)
        pair = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (buckets - 1)
        hashed[:, 1:] = torch.where(ids[:, 1:] == t.BOS, buckets - 1, pair)
        return self.scale * self.proj(self.embed(hashed))


class Smear(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = torch.where((ids == t.BOS)[..., None], x, torch.cat((x[:, :1], x[:, :-1]), dim=1))
        return torch.lerp(x, before, torch.sigmoid(self.gate))


class Values(nn.Module):
    def __init__(self, cfg: t.Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = nn.Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.scale = nn.Parameter(torch.empty(()))
        self.layer_scales = nn.ParameterDict({str(i): nn.Parameter(torch.empty(1)) for i in cfg.ve_layers})

    def forward(self, ids: Tensor) -> dict[int, Tensor]:
        shared = self.scale * self.proj(self.embed(ids))
        return {int(layer): scale * shared for layer, scale in self.layer_scales.items()}


class Attention(nn.Module):
    def __init__(self, cfg: t.Config, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.rope_dims = cfg.num_heads, cfg.num_kv_heads, cfg.rope_dims or cfg.head_dim
        self.exclusive, self.base = layer >= cfg.num_layers - cfg.xsa_last_n, cfg.rope_base
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.c_k, self.c_v = nn.Linear(dim, kv_dim, bias=False), nn.Linear(dim, kv_dim, bias=False)
        self.q_gain = nn.Parameter(torch.empty(cfg.num_heads, 1))

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, H, T, C): its first dims, as pairs (j, j + half), turned by position * base**(-2j / dims)."""
        half = self.rope_dims // 2
        position, j = (torch.arange(n, dtype=torch.float64, device=x.device) for n in (x.size(2), half))
        angle = position[:, None] * self.base ** (-j / half)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1).to(x.dtype)

    def forward(self, x: Tensor, values: Tensor | None) -> Tensor:
        b, s, d = x.shape
        q = self.c_q(x).view(b, s, self.heads, -1).transpose(1, 2)
        v = self.c_v(x) if values is None else self.c_v(x) + values
        k, v = (u.view(b, s, self.kv_heads, -1).transpose(1, 2) for u in (self.c_k(x), v))
        q, k = self.rotate(rms(q)) * self.q_gain[:, :, None], self.rotate(rms(k))
        k, v = (u.repeat_interleave(self.heads // self.kv_heads, dim=1) for u in (k, v))
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
        if self.exclusive:
            unit = F.normalize(v, dim=-1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        return self.proj(y.transpose(1, 2).reshape(b, s, d))


class MLP(nn.Module):
    def __init__(self, cfg: t.Config):
        super().__init__()
        hidden = round(cfg.mlp_mult * cfg.model_dim)
        self.fc, self.proj = nn.Linear(cfg.model_dim, hidden, bias=False), nn.Linear(hidden, cfg.model_dim, bias=False)
        self.slope = cfg.mlp_negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope) ** 2)


class Block(nn.Module):
    def __init__(self, cfg: t.Config, layer: int):
        super().__init__()
        self.attn, self.mlp, self.input_scale = Attention(cfg, layer), MLP(cfg), (layer + 1) ** -0.5
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim))

    def forward(self, x: Tensor, x0: Tensor, values: Tensor | None) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attn(self.input_scale * rms(x), values)
        return x + self.mlp_scale * self.mlp(self.input_scale * rms(x))


class Model(nn.Module):
    """Mean loss in nats of token ids (B, T) and their targets."""

    def __init__(self, cfg: t.Config):
        super().__init__()
        check(cfg)
        self.tok_emb, self.bigram = nn.Embedding(cfg.vocab_size, cfg.model_dim), Bigram(cfg)
        self.smear, self.value_embed = Smear(cfg.model_dim), Values(cfg)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.empty(cfg.num_layers // 2, cfg.model_dim))
        self.softcap = cfg.logit_softcap

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = x0 = self.smear(rms(self.tok_emb(ids) + self.bigram(ids)), ids)
        half, skips, values = len(self.blocks) // 2, [], self.value_embed(ids)
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = x + self.skip_weights[i - half] * skips.pop()
            x = block(x, x0, values.get(i))
            if i < half:
                skips.append(x)
        logits = self.softcap * torch.tanh(F.linear(rms(x), self.tok_emb.weight).float() / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    x = g.T if g.size(0) > g.size(1) else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if g.size(0) > g.size(1) else x


class Step:
    """One optimizer step after the other on the weights of `state`: clip, Muon, AdamW, average."""

    def __init__(self, cfg: t.Config, state: dict[str, Tensor], device: torch.device):
        self.cfg, self.dtype = cfg, t.compute_dtype(cfg, device)
        self.model = Model(cfg).to(device)
        self.model.load_state_dict(state)
        weights = list(self.model.parameters())
        linear = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear)}
        tables = {m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)}
        self.matrices = [p for p in weights if p in linear]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        scalars = [p for p in weights if p not in linear and p not in tables]
        groups = [dict(params=list(tables), weight_decay=cfg.embed_wd), dict(params=scalars, weight_decay=cfg.adam_wd)]
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
        self.average = [p.detach().clone() for p in weights]

    def __call__(self, ids: Tensor, targets: Tensor, scale: float, momentum: float) -> Tensor:
        """The loss before the step, at `scale` times the peak rates."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm)
        for group, peak in zip(self.adam.param_groups, (self.cfg.tied_embed_lr, self.cfg.scalar_lr)):
            group["lr"] = scale * peak
        with torch.no_grad():
            for p, buffer in zip(self.matrices, self.momentum):
                buffer.mul_(momentum).add_(p.grad)
                update, rate = (p.grad + momentum * buffer).to(self.dtype), scale * self.cfg.matrix_lr
                update = newton_schulz(update, self.cfg.muon_backend_steps)
                p.mul_(1 - rate * self.cfg.muon_wd)
                p.add_(update.float(), alpha=-rate * max(1.0, p.size(0) / p.size(1)) ** 0.5)
            self.adam.step()
            for a, p in zip(self.average, self.model.parameters()):
                a.lerp_(p, 1 - self.cfg.ema_decay)
        self.model.zero_grad()
        return loss.detach()
