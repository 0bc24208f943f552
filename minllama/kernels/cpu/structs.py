"""The ctypes counterparts of the structs in `src/structs.h`: the same fields in the same order.

A compiled library that describes other fields (`src/fields.inc`) is not used.
"""

from ctypes import POINTER, Structure, _Pointer, c_double, c_int64, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

from minllama.kernels.quantized_matrix import QuantizedMatrix

KINDS = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
INT4, INT8 = 0, 1


class Values(Structure):
    _fields_ = (("data", c_void_p), ("kind", c_int64))


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("bias", Values),
        ("kind", c_int64),
        ("in_dim", c_int64),
        ("out_dim", c_int64),
    )


def quantized_linear(weight: QuantizedMatrix) -> Linear:
    """Memory layout of a quantized matrix."""
    return Linear(
        weight=weight.quants.data_ptr(),
        scales=weight.scales.data_ptr(),
        mins=None if weight.mins is None else weight.mins.data_ptr(),
        kind=INT4 if weight.bits == 4 else INT8,
        in_dim=weight.in_features,
        out_dim=weight.out_features,
    )


def dense_linear(weight: Tensor) -> Linear:
    """Memory layout of a dense matrix (out, in)."""
    rows, columns = weight.shape
    return Linear(weight=weight.data_ptr(), kind=KINDS[weight.dtype], in_dim=columns, out_dim=rows)


class Layer(Structure):
    _fields_ = (
        ("attention_norm", Values),
        ("query", Linear),
        ("key", Linear),
        ("value", Linear),
        ("output", Linear),
        ("ffn_norm", Values),
        ("w1", Linear),
        ("w2", Linear),
        ("w3", Linear),
    )


class Model(Structure):
    _fields_ = (
        ("dim", c_int64),
        ("n_layers", c_int64),
        ("n_heads", c_int64),
        ("n_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("hidden_dim", c_int64),
        ("activation_bits", c_int64),
        ("sums_from", c_int64),
        ("amx_from", c_int64),
        ("norm_eps", c_double),
        ("embedding", Linear),
        ("output", Linear),
        ("norm", Values),
        ("layers", POINTER(Layer)),
    )


class Step(Structure):
    _fields_ = (
        ("n_tokens", c_int64),
        ("ids", c_void_p),
        ("rows", c_void_p),
        ("slots", c_void_p),
        ("seen", c_void_p),
        ("n_ancestors", c_int64),
        ("ancestors", c_void_p),
        ("rotation", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("cache_kind", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("hidden", c_void_p),
        ("n_logits", c_int64),
        ("logits_of", c_void_p),
        ("only_logits", c_int64),
        ("logits", c_void_p),
        ("lost", c_void_p),
    )


class Norm(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("dim", c_int64),
        ("eps", c_double),
        ("x", c_void_p),
        ("x_kind", c_int64),
        ("weight", c_void_p),
        ("weight_kind", c_int64),
        ("y", c_void_p),
        ("y_kind", c_int64),
        ("inverse", c_void_p),
        ("gradient", c_void_p),
        ("of_weight", c_void_p),
    )


class SwiGLU(Structure):
    _fields_ = (
        ("n", c_int64),
        ("kind", c_int64),
        ("u", c_void_p),
        ("v", c_void_p),
        ("y", c_void_p),
        ("u_gradient", c_void_p),
        ("v_gradient", c_void_p),
    )


class RoPE(Structure):
    _fields_ = (
        ("tokens", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("kind", c_int64),
        ("n_rotations", c_int64),
        ("back", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
        ("rotation", c_void_p),
    )


class Dequantize(Structure):
    _fields_ = (
        ("weight", POINTER(Linear)),
        ("y", c_void_p),
        ("kind", c_int64),
    )


class Blocks(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("blocks", c_int64),
        ("bytes", c_int64),
        ("kind", c_int64),
        ("data", c_void_p),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
    )


class Matmul(Structure):
    _fields_ = (
        ("weight", POINTER(Linear)),
        ("rows", c_int64),
        ("activation_bits", c_int64),
        ("sums_from", c_int64),
        ("x", c_void_p),
        ("quants", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("y", c_void_p),
        ("panels", c_void_p),
    )


class HalfMatmul(Structure):
    _fields_ = (
        ("weight", POINTER(Linear)),
        ("transposed", c_int64),
        ("rows", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
    )


class AdamW(Structure):
    _fields_ = (
        ("n_tensors", c_int64),
        ("starts", c_void_p),
        ("parameters", c_void_p),
        ("gradients", c_void_p),
        ("exp_avgs", c_void_p),
        ("exp_avg_sqs", c_void_p),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("step_size", c_double),
        ("shrink", c_double),
    )


class Heads(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("row_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
    )


class Attention(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("length", c_int64),
        ("n_heads", c_int64),
        ("n_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("kind", c_int64),
        ("starts", c_void_p),
        ("query", Heads),
        ("key", Heads),
        ("value", Heads),
        ("out", Heads),
        ("log_sums", c_void_p),
        ("out_gradient", Heads),
        ("query_gradient", Heads),
        ("key_gradient", Heads),
        ("value_gradient", Heads),
    )


class LowRank(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("in_dim", c_int64),
        ("out_dim", c_int64),
        ("rank", c_int64),
        ("kind", c_int64),
        ("onto", c_int64),
        ("scale", c_double),
        ("dropout", c_double),
        ("seed", c_int64),
        ("x", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("y", c_void_p),
        ("low", c_void_p),
        ("x_gradient", c_void_p),
        ("a_parts", c_void_p),
        ("b_parts", c_void_p),
    )


class Draw(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("size", c_int64),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("logits", c_void_p),
        ("uniforms", c_void_p),
        ("chosen", c_void_p),
    )


# In the order of `src/structs.h`.
STRUCTS = (
    *(Values, Linear, Layer, Model, Step, Norm, SwiGLU),
    *(RoPE, Dequantize, Blocks, Matmul, HalfMatmul, AdamW, Heads, Attention, LowRank, Draw),
)

_TYPE_NAMES = {c_int64: "int64", c_double: "double", c_void_p: "pointer"}


def described(struct: type[Structure]) -> str:
    """The fields of a struct as `src/fields.inc` has them: its name, field, offset and type."""
    name = struct.__name__
    lines = [
        f"{name} {field} {getattr(struct, field).offset} {_type_name(kind)}\n"
        for field, kind, *_ in struct._fields_
    ]
    return "".join([*lines, f"{name} {sizeof(struct)} size\n"])


def _type_name(kind: Any) -> str:
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    return "pointer" if issubclass(kind, _Pointer) else str(kind.__name__)
