"""Writes wgmma_shapes.cuh: one function per shape (m64nNk16, fp32 accumulators) and operands; --check compares."""

import sys
from pathlib import Path

KINDS = {
    # name: (A in registers, A is MN-major, B is MN-major, columns N)
    "wgmma_ss": (False, False, False, (64, 80, 112, 128)),
    "wgmma_sb": (False, False, True, (64,)),
    "wgmma_rs": (True, False, True, (64, 128, 256)),
}
HEADER = """\
// Written by generate_wgmma.py; do not edit. m64nNk16: D = A B + D, or D = A B for the functions called *_first, which
// do not read D: ptxas then knows that its registers need no value before. wgmma_ss: A and B in shared memory, both
// K-major; wgmma_sb: the same, B MN-major; wgmma_rs: A in registers, B MN-major in shared memory.
#pragma once
#include <stdint.h>

#include "device.cuh"

namespace seqpar {
"""


def function(name: str, columns: int, first: bool) -> str:
    in_registers, a_transposed, b_transposed, _ = KINDS[name]
    registers = columns // 2
    d = ", ".join(f"%{i}" for i in range(registers))
    if in_registers:
        parameters = "uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b"
        inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)'
        a = "{" + ", ".join(f"%{registers + i}" for i in range(4)) + "}"
        b, flags = registers + 4, f"1, 1, {int(b_transposed)}"
    else:
        parameters, inputs = "uint64_t a, uint64_t b", '"l"(a), "l"(b)'
        a, b = f"%{registers}", registers + 1
        flags = f"1, 1, {int(a_transposed)}, {int(b_transposed)}"
    outputs = ", ".join(f'"{"=" if first else "+"}f"(d[{i}])' for i in range(registers))

    def statement(dtype: str) -> str:
        return (
            f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, {"0" if first else "1"}, 0; '
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} "
            f'{{{d}}}, {a}, %{b}, p, {flags}; }}"\n'
            f"      : {outputs}\n      : {inputs});\n"
        )

    suffix = "_first" if first else ""
    return (
        f"template <class T>\nDEVICE void {name}{suffix}(float (&d)[{registers}], {parameters}) {{\n"
        f"  if constexpr (T::is_bf16) {{\n{statement('bf16')}  }} else {{\n{statement('f16')}  }}\n}}\n"
    )


def main() -> int:
    parts = [HEADER, "// clang-format off\n"]
    for name, (*_, all_columns) in KINDS.items():
        for columns in all_columns:
            parts += [function(name, columns, False), function(name, columns, True)]
    parts.append("// clang-format on\n\n}  // namespace seqpar\n")
    path, text = Path(__file__).parent / "wgmma_shapes.cuh", "\n".join(parts)
    if "--check" not in sys.argv:
        path.write_text(text)
    elif path.read_text() != text:
        print(f"expected what generate_wgmma.py writes in {path.name}, got something else", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
