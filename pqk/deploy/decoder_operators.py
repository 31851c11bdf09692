"""What a decoder's file may have instead of ONNX's own: attention as ONNX Runtime has it, and the last token alone.

`pqk::grouped_query_attention` is `GroupQueryAttention` (com.microsoft) with rotary embeddings outside and what is seen
as its bias: of all that it could do, the part whose answers do not depend on which side padding stands on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import opset21
from onnxscript.values import Op, Opset
from torch import Tensor

from pqk.core.every_token import LAST_TOKEN
from pqk.deploy.onnx_ops import MICROSOFT
from pqk.deploy.onnx_pools import Value

op: Any = opset21  # its types know no value of several types
VERSION = 1
HEAD_STEP = 8
"""the width of a head that `GroupQueryAttention` takes is a multiple of this"""


# ---- in torch


@torch.library.custom_op(f"pqk::{LAST_TOKEN}", mutates_args=())
def last_token_op(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1, C] of `x` [B, S, C]: of each text the last of the S new tokens that is no padding in `mask` [B, P + S]."""
    new = (mask[:, -x.shape[1] :] > 0).long()
    last = (new * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
    return x[torch.arange(len(x), device=x.device), last].unsqueeze(1)


@last_token_op.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, x.shape[2]))


@torch.library.custom_op("pqk::sequence_lengths", mutates_args=())
def sequence_lengths_op(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of each text less one, int32 [B], and tokens, int32 [], of a mask int64 [B, T]: padding counts."""
    batch, total = mask.shape
    return torch.full((batch,), total - 1, dtype=torch.int32), torch.tensor(total, dtype=torch.int32)


@sequence_lengths_op.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty((mask.shape[0],), dtype=torch.int32), mask.new_empty((), dtype=torch.int32)


@torch.library.custom_op("pqk::grouped_query_attention", mutates_args=())
def grouped_query_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    lengths: Tensor,
    total: Tensor,
    seen: Tensor,
    heads: int,
    groups: int,
    scale: float,
    softcap: float,
    key_step: Tensor | None = None,
    value_step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers [B, S, H * D], and keys and values [B, G, P + S, D] of all tokens.

    `query` is [B, S, H * D], `key` and `value` are [B, S, G * D], those before [B, G, P, D]; `seen`, which is added to
    scores, is [B, 1, S, P + S] and says of itself that no token sees a later one. With steps, float32 [], keys and
    values of all tokens are int8, and new ones are rounded before they are seen.
    """
    q = query.unflatten(2, (heads, -1)).transpose(1, 2)
    new_key, new_value = (t.unflatten(2, (groups, -1)).transpose(1, 2) for t in (key, value))
    if key_step is not None and value_step is not None:
        new_key, new_value = (
            (t / step).round().clamp(-128, 127).to(torch.int8)
            for t, step in ((new_key, key_step), (new_value, value_step))
        )
    keys, values = torch.cat([past_key, new_key], 2), torch.cat([past_value, new_value], 2)
    share = heads // groups
    all_keys, all_values = (
        (t if step is None else t * step).repeat_interleave(share, 1)
        for t, step in ((keys, key_step), (values, value_step))
    )
    scores = scale * (q @ all_keys.transpose(2, 3))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    found = (scores + seen).softmax(-1) @ all_values
    return found.transpose(1, 2).flatten(2), keys, values


@grouped_query_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, *others: Any, **named: Any) -> Any:
    batch, kept, before, width = past_key.shape
    both = past_key.new_empty((batch, kept, before + key.shape[1], width))
    return torch.empty_like(query), both, torch.empty_like(both)


LAST = torch.ops.pqk.last_token.default
LENGTHS = torch.ops.pqk.sequence_lengths.default
GROUPED = torch.ops.pqk.grouped_query_attention.default


# ---- in ONNX


def _schema() -> OpSchema:
    """ONNX Runtime's, as far as it is needed; onnx itself does not know the operator."""
    kinds = OpSchema.FormalParameterOption
    names = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
    unused = ("cos_cache", "sin_cache", "position_ids")
    types = ("tensor(float)", "tensor(int8)", "tensor(int32)", "tensor(int64)")
    inputs = [OpSchema.FormalParameter(n, f"T_{n}") for n in names]
    optional = (*unused, "attention_bias", "head_sink", "k_scale", "v_scale")
    inputs += [OpSchema.FormalParameter(n, f"T_{n}", param_option=kinds.Optional) for n in optional]
    outputs = [OpSchema.FormalParameter(n, f"T_{n}") for n in ("output", "present_key", "present_value")]
    return OpSchema(
        "GroupQueryAttention",
        MICROSOFT,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(p.type_str, list(types), "") for p in (*inputs, *outputs)],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("kv_num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
            OpSchema.Attribute("softcap", OpSchema.AttrType.FLOAT, required=False),
            OpSchema.Attribute("k_quant_type", OpSchema.AttrType.STRING, required=False),
            OpSchema.Attribute("v_quant_type", OpSchema.AttrType.STRING, required=False),
            OpSchema.Attribute("kv_cache_bit_width", OpSchema.AttrType.INT, required=False),
        ],
    )


OPERATOR = Op(Opset(MICROSOFT, VERSION), "GroupQueryAttention", _schema())


def last_token(x: Value, mask: Value) -> Value:
    """`pqk::last_token`, of a mask of ones and zeros: its last node is called so."""
    last = op.ArgMax(mask, axis=1, keepdims=1, select_last_index=1)
    last = op.Sub(last, op.Shape(mask, start=1, end=2))  # counted from the end, where new tokens stand
    return op.GatherND(x, op.Unsqueeze(last, op.Constant(value_ints=[2])), batch_dims=1)


def sequence_lengths(mask: Value) -> tuple[Value, Value]:
    """`pqk::sequence_lengths`."""
    total = op.Cast(op.Shape(mask, start=1, end=2), to=TensorProto.INT32)
    one = op.Cast(op.Constant(value_ints=[1]), to=TensorProto.INT32)
    return op.Expand(op.Sub(total, one), op.Shape(mask, start=0, end=1)), op.Squeeze(total)


def grouped_query_attention(
    query: Value,
    key: Value,
    value: Value,
    past_key: Value,
    past_value: Value,
    lengths: Value,
    total: Value,
    seen: Value,
    heads: int,
    groups: int,
    scale: float,
    softcap: float,
    key_step: Value | None = None,
    value_step: Value | None = None,
) -> Any:
    """`pqk::grouped_query_attention`."""
    more: dict[str, Any] = {"softcap": softcap} if softcap else {}
    steps: list[Value] = []
    if key_step is not None and value_step is not None:
        one = op.Constant(value_ints=[1])
        steps = [op.Reshape(key_step, one), op.Reshape(value_step, one)]
        more |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    return OPERATOR(
        query, key, value, past_key, past_value, lengths, total, None, None, None, seen,
        *([None, *steps] if steps else []),
        num_heads=heads, kv_num_heads=groups, scale=scale, **more,
    )  # fmt: skip


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    LAST: last_token,
    LENGTHS: sequence_lengths,
    GROUPED: grouped_query_attention,
}
