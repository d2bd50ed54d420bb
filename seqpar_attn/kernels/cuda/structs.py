"""The structs of csrc/seqpar_attn.h for ctypes; a test compares them with the library's own sizes and offsets."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

ABI = 3


class Strides(ctypes.Structure):
    _fields_: ClassVar[Any] = [(name, c_int64) for name in ("part", "batch", "seq", "head")]


class RowStrides(ctypes.Structure):
    _fields_: ClassVar[Any] = [(name, c_int64) for name in ("batch", "head")]


class Problem(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *[(n, c_int32) for n in ("batch", "seqlen_q", "seqlen_k", "parts", "nheads", "nheads_kv", "headdim")],
        *[(n, c_int32) for n in ("dtype", "mask", "offset")],
        *[(n, c_void_p) for n in ("key_lo", "key_hi", "query_lo", "query_hi")],
        *[(n, c_float) for n in ("softmax_scale", "softcap")],
        *[(n, c_int32) for n in ("sm_margin", "variant")],
    ]


class Forward(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("problem", Problem),
        *[(n, c_void_p) for n in ("q", "k", "v", "lse", "out_acc", "out")],
        *[(n, c_int32) for n in ("carry", "keep")],
        *[(f"{n}_strides", Strides) for n in ("q", "k", "v", "acc", "out")],
        ("lse_strides", RowStrides),
        ("counter", c_void_p),
    ]


class Backward(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("problem", Problem),
        *[(n, c_void_p) for n in ("q", "k", "v", "dout", "lse", "delta", "dq", "dk", "dv")],
        *[(n, c_int32) for n in ("carry_dq", "carry_dkv", "round_dkv", "deterministic")],
        *[(f"{n}_strides", Strides) for n in ("q", "k", "v", "dout", "dq", "dk", "dv")],
        *[(f"{n}_strides", RowStrides) for n in ("lse", "delta")],
        ("counter", c_void_p),
    ]


class Delta(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *[(n, c_int32) for n in ("batch", "seqlen", "nheads", "headdim", "dtype")],
        *[(n, c_void_p) for n in ("out", "dout", "delta")],
        *[(f"{n}_strides", Strides) for n in ("out", "dout")],
        ("delta_strides", RowStrides),
    ]


class FinishDq(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *[(n, c_int32) for n in ("batch", "seqlen", "nheads", "headdim", "dtype")],
        ("softmax_scale", c_float),
        *[(n, c_void_p) for n in ("dq", "grad")],
        *[(f"{n}_strides", Strides) for n in ("dq", "grad")],
    ]


class Merge(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *[(n, c_int32) for n in ("batch", "seqlen", "nheads", "headdim", "dtype", "part_fp32")],
        *[(n, c_void_p) for n in ("lse", "out_acc", "lse_part", "out_part", "out")],
        *[(f"{n}_strides", Strides) for n in ("acc", "part", "out")],
        *[(f"{n}_strides", RowStrides) for n in ("lse", "lse_part")],
    ]


class Accumulate(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *[(n, c_int32) for n in ("batch", "count")],
        ("elements", c_int64),
        *[(n, c_void_p) for n in ("target", "parts")],
        *[(n, c_int64) for n in ("target_batch_stride", "part_stride", "part_batch_stride")],
    ]


STRUCTS = (Forward, Backward, Delta, FinishDq, Merge, Accumulate)
"""In the order in which ``seqpar_attn_struct_size`` numbers them."""
