"""FlashAttention-3 before 2025-07-11: operators without a fake kernel; returns (output, log-sum-exp)."""

import torch

LIBRARY = torch.library.Library("flash_attn_3", "DEF")
LIBRARY.define("fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor, Tensor)")
LIBRARY.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool causal)"
    " -> (Tensor, Tensor, Tensor)"
)


def forward(q, k, v, scale, causal):
    return torch.empty_like(q), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)


def backward(dout, q, k, v, out, lse, scale, causal):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


LIBRARY.impl("fwd", forward, "CUDA")
LIBRARY.impl("bwd", backward, "CUDA")


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal):
        scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
        out, lse = torch.ops.flash_attn_3.fwd(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, causal
        return out, lse

    @staticmethod
    def backward(ctx, dout, *_):
        return *torch.ops.flash_attn_3.bwd(dout, *ctx.saved_tensors, *ctx.settings), None, None


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    return FlashAttnFunc.apply(q, k, v, softmax_scale, causal)


def flash_attn_varlen_func(*_, **__):
    raise NotImplementedError("no test calls it")
