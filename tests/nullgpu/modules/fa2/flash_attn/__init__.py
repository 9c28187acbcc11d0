"""FlashAttention-2 of 2025-08 (2.8.3): traceable custom operators; pads heads to a multiple of 8; returns a tensor."""

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cuda")
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


_flash_attn_forward.register_fake(_flash_attn_forward._init_fn)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cuda")
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
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
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        scale, channels = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale, q.size(-1)
        q, k, v = (pad(t, (0, -channels % 8)) if channels % 8 else t for t in (q, k, v))
        out, lse, mask, state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, return_softmax and dropout_p > 0
        )
        if is_grad_enabled and any(t.requires_grad for t in (q, k, v)):
            ctx.save_for_backward(q, k, v, out, lse, state)
            ctx.settings = dropout_p, scale, causal, *window_size, softcap, alibi_slopes, deterministic
        out = out[..., :channels]
        return (out, lse, mask) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *_):
        *saved, state = ctx.saved_tensors
        gradients, channels = [torch.empty_like(t) for t in saved[:3]], dout.size(-1)
        torch.ops.flash_attn._flash_attn_backward(
            pad(dout, (0, -channels % 8)) if channels % 8 else dout, *saved, *gradients, *ctx.settings, rng_state=state
        )
        return *(g[..., :channels] for g in gradients), *[None] * 9


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), device_types="cuda")
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


_flash_attn_varlen_forward.register_fake(_flash_attn_varlen_forward._init_fn)


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"), device_types="cuda"
)
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    return torch.empty_like(softmax_lse)


_flash_attn_varlen_backward.register_fake(_flash_attn_varlen_backward._init_fn)


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
        assert q.ndim == 3 and cu_seqlens_q.dtype == torch.int32
        out, lse = torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in saved[:3]]
        torch.ops.flash_attn._flash_attn_varlen_backward(
            dout, *saved, *gradients, cu_seqlens_q, cu_seqlens_k, *ctx.settings
        )
        return *gradients, *[None] * 6


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)
