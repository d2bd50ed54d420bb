"""Placeholder until the build joins: loads what SEQPAR_ATTN_LIBRARY names."""

import ctypes, functools, os
from .structs import ABI, STRUCTS


@functools.cache
def load():
    lib = ctypes.CDLL(os.environ["SEQPAR_ATTN_LIBRARY"])
    assert lib.seqpar_attn_abi() == ABI
    lib.seqpar_attn_struct_size.restype = ctypes.c_size_t
    for i, s in enumerate(STRUCTS):
        assert lib.seqpar_attn_struct_size(i) == ctypes.sizeof(s), (i, lib.seqpar_attn_struct_size(i), ctypes.sizeof(s))
    lib.seqpar_attn_error.restype = ctypes.c_char_p
    lib.seqpar_attn_architectures.restype = ctypes.c_char_p
    for n in ("forward", "backward", "delta", "convert"):
        getattr(lib, f"seqpar_attn_{n}").argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lib


def unavailable():
    return None if "SEQPAR_ATTN_LIBRARY" in os.environ else "no library"


def architectures():
    return load().seqpar_attn_architectures().decode().split(";")
