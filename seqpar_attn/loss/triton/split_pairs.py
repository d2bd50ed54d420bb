"""Adding to split sums (:mod:`.split`) that lie in shared memory, for :mod:`.weight_gradient`: Hopper, in Gluon."""

from __future__ import annotations

from ...kernels.triton.hopper.adapter import gl, gluon

# Four float32 b0 to b3, two of a row and two of another; halves of a row's two go to one register. Half of the
# instructions that the same takes in Gluon, and tensor cores wait for them. As integers NaNs (always positive after an
# addition) are the largest: they become one that can be rounded up.
_ROUND: gl.constexpr = gl.constexpr("""
    min.s32 b0, b0, 0x7fc00000;
    min.s32 b1, b1, 0x7fc00000;
    min.s32 b2, b2, 0x7fc00000;
    min.s32 b3, b3, 0x7fc00000;
    add.s32 b0, b0, 128;
    add.s32 b1, b1, 128;
    add.s32 b2, b2, 128;
    add.s32 b3, b3, 128;
    prmt.b32 l0, b0, b1, 0x0051;
    prmt.b32 l1, b2, b3, 0x0051;
    prmt.b32 $2, l0, l1, 0x5410;
    add.s32 b0, b0, 0x8000;
    add.s32 b1, b1, 0x8000;
    add.s32 b2, b2, 0x8000;
    add.s32 b3, b3, 0x8000;
    prmt.b32 $0, b0, b1, 0x7632;
    prmt.b32 $1, b2, b3, 0x7632;
}""")
_START: gl.constexpr = gl.constexpr("""{
    .reg .b32 b<4>, l<2>, s<4>;
    .reg .f32 f<4>;
""")


_ADDENDS = ("$3", "$5", "$4", "$6")
"""Of two rows: both left ones come first."""


def _joined(number: int, high: str, spread: str, half: int) -> str:
    """b = high half and signed low half, as float32; plus the number's addend."""
    return f"""
    prmt.b32 b{number}, {high}, {spread}, {"0x1054" if half == 0 else "0x3276"};
    and.b32 s{number}, b{number}, 0x8000;
    mad.lo.s32 b{number}, s{number}, -2, b{number};
    mov.b32 f{number}, b{number};
    add.f32 f{number}, f{number}, {_ADDENDS[number]};
    mov.b32 b{number}, f{number};
"""


_WRITE = gl.constexpr(
    _START.value + "".join(f"    mov.b32 b{n}, {addend};\n" for n, addend in enumerate(_ADDENDS)) + _ROUND.value
)
_ADD = gl.constexpr(
    _START.value
    + "    prmt.b32 l0, $9, 0, 0x1404;\n    prmt.b32 l1, $9, 0, 0x3424;\n"
    + _joined(0, "$7", "l0", 0) + _joined(1, "$7", "l0", 1) + _joined(2, "$8", "l1", 0) + _joined(3, "$8", "l1", 1)
    + _ROUND.value
)  # fmt: skip


@gluon.jit
def add_in_place(x, high_s, low_s, FIRST: gl.constexpr):
    """64 columns in shared memory, plus ``x`` (or ``x`` alone if FIRST): as ``split.add_split_kernel``, but that
    ties at the last of the kept bits go away from zero. Shared memory as pairs of neighbours, ``[64, 32]`` int32 and
    int16: single bytes take more instructions to put together than all of the rest."""
    left, right = gl.split(gl.reshape(x, [64, 32, 2]))
    if FIRST:
        high, low = gl.inline_asm_elementwise(
            _WRITE, "=&r,=&r,=&r,f,f,f,f", [left, right], dtype=(gl.int32, gl.int16), is_pure=True, pack=2
        )
    else:
        high, low = gl.inline_asm_elementwise(
            _ADD, "=&r,=&r,=&r,f,f,f,f,r,r,r",
            [left, right, high_s.load(left.type.layout), low_s.load(left.type.layout)],
            dtype=(gl.int32, gl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    high_s.store(high)
    low_s.store(low)
