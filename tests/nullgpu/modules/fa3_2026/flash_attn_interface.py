"""FlashAttention-3 since 2025-11-17 (this one: 2026-08): traceable custom operators; returns a tensor."""

import torch
from torch import Tensor


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=(), device_types="cuda")
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *batch, length, heads, _ = q.shape  # no batch where there are segments
    empty = [torch.tensor([], device=q.device) for _ in range(2)]
    return (
        q.new_empty((*batch, length, heads, v.size(-1))),
        q.new_empty((*batch, heads, length), dtype=torch.float32),
        *empty,
    )


_flash_attn_forward.register_fake(_flash_attn_forward._init_fn)


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cuda")
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    return torch.empty_like(softmax_lse)


_flash_attn_backward.register_fake(_flash_attn_backward._init_fn)


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        deterministic,
        sm_margin,
        with_lse,
    ):
        scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
        out, lse, *_ = _flash_attn_forward(
            q, k, v, scale, causal, *window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, causal, *window_size, softcap, deterministic, sm_margin
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx, dout, *_):
        gradients = [torch.empty_like(t) for t in ctx.saved_tensors[:3]]
        _flash_attn_backward(dout, *ctx.saved_tensors, *gradients, *ctx.settings)
        return *gradients, *[None] * 10


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
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        deterministic,
        sm_margin,
        return_attn_probs,
    )


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert q.ndim == 3 and cu_seqlens_q.dtype == torch.int32
        ctx.settings = dict(
            softmax_scale=q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
        segments = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        out, lse, *_ = _flash_attn_forward(q, k, v, causal=causal, **segments, **ctx.settings)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.settings["is_causal"] = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in saved[:3]]
        _flash_attn_backward(
            dout, *saved, *gradients, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **ctx.settings
        )
        return *gradients, *[None] * 6


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
):
    return FlashAttnVarlenFunc.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    )
