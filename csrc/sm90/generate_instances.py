"""Writes instances/*.cu, one kernel each, so that ninja compiles them side by side; --check only compares."""

import itertools
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "instances"
DTYPES = {"bf16": "Bf16", "fp16": "Fp16"}
BACKWARD = [64, 128, 256]
FORWARD = [(64, "Wide"), (128, "Wide"), (128, "Narrow"), (256, "Wide")]
TEMPLATE = """\
// Written by generate_instances.py; do not edit.
#include "../{kind}_instance.cuh"

namespace seqpar::sm90 {{
template int32_t {kind}_instance<{arguments}>(const {struct}&, cudaStream_t);
}}
"""


def instances() -> dict[str, str]:
    files = {}
    for (headdim, rows), (dtype, name), interval, softcap in itertools.product(
        FORWARD, DTYPES.items(), (False, True), (False, True)
    ):
        if rows == "Narrow" and headdim == 128 and (interval or softcap):
            continue  # only the plain kernels come in two shapes
        parts = ["forward", str(headdim), rows.lower(), dtype, "interval" * interval, "softcap" * softcap]
        arguments = f"{headdim}, {name}, Rows::k{rows}, {str(interval).lower()}, {str(softcap).lower()}"
        files["_".join(filter(None, parts)) + ".cu"] = TEMPLATE.format(
            kind="forward", arguments=arguments, struct="SeqparForward"
        )
    for headdim, (dtype, name), interval, softcap, cut in itertools.product(
        BACKWARD, DTYPES.items(), (False, True), (False, True), (False, True)
    ):
        if cut and (headdim != 128 or interval or softcap):
            continue  # pieces of key tiles: only where they help
        parts = ["backward", str(headdim), dtype, "interval" * interval, "softcap" * softcap, "cut" * cut]
        arguments = f"{headdim}, {name}, " + ", ".join(str(x).lower() for x in (interval, softcap, cut))
        files["_".join(filter(None, parts)) + ".cu"] = TEMPLATE.format(
            kind="backward", arguments=arguments, struct="SeqparBackward"
        )
    return files


def main() -> int:
    wanted = instances()
    if "--check" in sys.argv:
        found = {path.name: path.read_text() for path in FOLDER.glob("*.cu")}
        if found != wanted:
            differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            print(f"expected what generate_instances.py writes, differing: {', '.join(differ)}", file=sys.stderr)
            return 1
        return 0
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.cu"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:  # leave times alone: ninja looks at them
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
