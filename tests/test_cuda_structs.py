"""The ctypes structs are those of csrc/seqpar_attn.h: names, order, offsets, types and sizes, by the C compiler."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess

import pytest
import torch
from build_cases import ROOT

from seqpar_attn.kernels import cuda
from seqpar_attn.kernels.cuda import structs

HEADER = (ROOT / "csrc" / "seqpar_attn.h").read_text()
DECLARED = {name: body for body, name in re.findall(r"typedef struct \{([^}]*)\} Seqpar(\w+);", HEADER)}
KINDS = {ctypes.c_int32: "int32", ctypes.c_int64: "int64", ctypes.c_float: "float", ctypes.c_void_p: "pointer"}


def mirrors() -> dict[str, type[ctypes.Structure]]:
    found = {name: value for name, value in vars(structs).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, ctypes.Structure)}


def layout(struct: type[ctypes.Structure]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, kind in struct._fields_:
        field = getattr(struct, name)
        rows.append([name, field.offset, field.size, KINDS.get(kind, kind.__name__)])
    return rows


def fields(body: str) -> list[str]:
    """The names in a struct's declaration, in order."""
    statements = re.sub(r"//.*", "", body).split(";")
    return [re.sub(r".*[\s*]", "", part.strip()) for line in statements if line.strip() for part in line.split(",")]


def test_every_struct_of_the_header_has_a_mirror() -> None:
    assert set(mirrors()) == set(DECLARED)
    functions = re.findall(r"int32_t seqpar_attn_(\w+)\(const Seqpar(\w+)\* arguments, void\* stream\)", HEADER)
    assert [name for _, name in functions] and {name for _, name in functions} == {s.__name__ for s in structs.STRUCTS}
    assert all(function == re.sub("(?<!^)(?=[A-Z])", "_", name).lower() for function, name in functions)


def test_abi_and_enumerations() -> None:
    assert re.findall(r"#define SEQPAR_ATTN_ABI (\d+)", HEADER) == [str(structs.ABI)]
    values = dict(re.findall(r"SEQPAR_(\w+) = (\d+)", HEADER))
    ours = {kind.name: number for kind, number in cuda._MASKS.items()}
    ours |= {"BF16": cuda._DTYPES[torch.bfloat16], "FP16": cuda._DTYPES[torch.float16]}
    assert values == {name: str(value) for name, value in ours.items()}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_layout(tmp_path) -> None:
    """A C program prints every field as the compiler sees it."""
    kinds = ', int32_t: "int32", int64_t: "int64", float: "float", SeqparStrides: "Strides"'
    kinds += ', SeqparRowStrides: "RowStrides", SeqparProblem: "Problem", default: "pointer"'
    lines = [
        '#include <stdio.h>\n#include "seqpar_attn.h"',
        f"#define KIND(x) _Generic((x){kinds})",
        r'#define FIELD(T, f) printf("%s[\"%s\", %zu, %zu, \"%s\"]", i++ ? ", " : "", #f, offsetof(T, f),'
        r" sizeof(((T*)0)->f), KIND(((T*)0)->f));",
        'int main(void) { int i; printf("{");',
    ]
    for number, (name, body) in enumerate(DECLARED.items()):
        lines.append(rf'printf("%s\"{name}\": [%zu, [", {number} ? ", " : "", sizeof(Seqpar{name})); i = 0;')
        lines += [f"FIELD(Seqpar{name}, {field})" for field in fields(body)]
        lines.append('printf("]]");')
    lines.append('printf("}\\n"); return 0; }')
    program = tmp_path / "layout"
    command = ["cc", "-std=c11", f"-I{ROOT / 'csrc'}", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)
    in_c = json.loads(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)
    assert in_c == {name: [ctypes.sizeof(struct), layout(struct)] for name, struct in mirrors().items()}
    assert len(in_c["Problem"][1]) == 18
