"""Tables of README.md and docs from committed result files, and their pictures.

    python3 benchmarks/readme.py            # writes what differs
    python3 benchmarks/readme.py --check    # says what differs, exit status 1; a test does the same

A table stands between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``; NAME is a function in BLOCKS, and what is
between the two is never written by hand. Torch is needed only for the table that the planner computes, whose package
imports it, and matplotlib only for pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from files import RESULTS, ROOT, read

GIB = 2**30
PAGES = ("README.md", "docs/communication.md", "docs/memory.md", "docs/scale.md")
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def rows_to_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def result(name: str, part: str) -> dict[str, Any]:
    return read(RESULTS / f"{name}.json", part)


# Attention --------------------------------------------------------------------------------------------------------


def _case(shape: dict[str, Any], headdim: bool) -> str:
    grouped = f", {shape['nheads']}:{shape['nheads_kv']} heads" if shape["nheads"] != shape["nheads_kv"] else ""
    dimension = f", {shape['headdim']}" if headdim else ""
    return f"{shape['seqlen']} {shape['mask']}{dimension}{grouped}"


def _tflops(row: dict[str, Any], who: Sequence[str]) -> list[str]:
    return [f"{row['results'][x]['tflops']['median']:.0f}" if x in row["results"] else "-" for x in who]


def attention() -> str:
    rows = result("cuda/attention", "attention")["rows"]
    lines = []
    for direction in ("forward", "backward"):
        for row in (x for x in rows if x["direction"] == direction):
            ratios = [f"{row['ratios'][who]['fa4']:.2f}" for who in ("cuda", "triton")]
            speeds = _tflops(row, ("cuda", "triton", "fa4", "cudnn"))
            lines.append([_case(row["shape"], True), direction, *speeds, *ratios])
    header = ["tokens, mask, head dimension", "direction", "cuda", "Triton", "FA4", "cuDNN", "cuda / FA4"]
    return rows_to_table([*header, "Triton / FA4"], lines)


def attention_portable() -> str:
    lines = []
    for row in result("attention", "attention")["rows"]:
        shape = row["shape"]
        wanted = shape["headdim"] == 128 and shape["nheads_kv"] == 32
        if wanted and (shape["seqlen"], shape["mask"]) in ((16384, "full"), (16384, "causal"), (4096, "causal")):
            ratios = [f"{row['ratios']['triton'][who]:.2f}" for who in ("flex", "fa4")]
            speeds = _tflops(row, ("triton", "flex", "fa2", "cudnn", "fa4"))
            lines.append([_case(shape, False), row["direction"], *speeds, *ratios])
    header = ["tokens, mask", "direction", "ours", "FlexAttention", "FA2", "cuDNN", "FA4", "ours / Flex", "ours / FA4"]
    return rows_to_table(header, lines)


# A rank's share ---------------------------------------------------------------------------------------------------

METHODS = {"zigzag": "zigzag", "dist_flash": "DistFlashAttn"}
SHARES = {
    "cuda/ring": "cuda",
    "cuda/compute_only/ring": "cuda, nothing transferred",
    "triton_hopper/ring": "Triton for Hopper",
    "triton/ring": "Triton",
}


def ring() -> str:
    lines = []
    for name, kernels in SHARES.items():
        for row in result(name, "ring")["rows"]:
            if row["world_size"] == 8:
                times = [f"{x['slowest_ms']:.2f} ({x['ideal_ms']:.2f})" for x in (row["forward"], row["backward"])]
                lines.append([kernels, str(row["tokens_per_gpu"]), METHODS[row["method"]], *times])
    return rows_to_table(["kernels", "tokens per GPU", "method", "forward (ideal)", "backward (ideal)"], lines)


RANKS = {
    "zigzag, copy engines": ("zigzag, copy engines",),
    "DistFlashAttn, copy engines": ("dist_flash, copy engines",),
    "zigzag, NCCL": ("zigzag",),
    "DistFlashAttn, NCCL": ("dist_flash",),
    "Ulysses, copy engines": ("ulysses, copy engines",),
    "USP, copy engines": ("usp, copy engines",),
    "Ulysses, NCCL": ("ulysses",),
    "USP, NCCL": ("usp",),
    "ring-flash-attention": ("ring-flash-attention zigzag",),
    "torch context_parallel": ("torch context_parallel, all-gather", "torch context_parallel, all-to-all"),
}


def ranks() -> str:
    """Percent of ideal, both directions; of two variants the better one. Where rounds of a forward differ by more than
    threefold the backward stands beside it."""
    lines = []
    for length in result("ranks/ranks-4", "ranks")["lengths"]:
        rows = {(x["method"], x["direction"]): x for x in length["rows"]}
        cells = [str(length["tokens_per_gpu"])]
        for names in RANKS.values():
            best = max((x for x in names if (x, "both") in rows), key=lambda x: rows[x, "both"]["of_ideal"])
            cell = f"{100 * rows[best, 'both']['of_ideal']:.1f}"
            spread = rows[best, "forward"]["slowest_ms"]
            if spread["max"] > 3 * spread["min"]:
                cell += f" ({100 * rows[best, 'backward']['of_ideal']:.1f} backward)"
            cells.append(cell)
        lines.append(cells)
    return rows_to_table(["tokens per GPU", *RANKS], lines)


def transports() -> str:
    """Zigzag's milliseconds by both transports, and where nothing moves."""
    directions = ("forward", "backward")
    lines = []
    for length in result("ranks/ranks-4", "ranks")["lengths"]:
        rows = {(x["method"], x["direction"]): x for x in length["rows"]}
        cells = [str(length["tokens_per_gpu"])]
        for direction in directions:
            nccl, pushed = (rows[name, direction] for name in ("zigzag", "zigzag, copy engines"))
            values = nccl["slowest_ms"]["median"], pushed["slowest_ms"]["median"], pushed["computation_ms"]
            cells += [f"{x:.2f}" for x in values]
        lines.append(cells)
    header = [f"{direction}: NCCL" if n == 0 else name for direction in directions for n, name in enumerate(TRANSPORTS)]
    return rows_to_table(["tokens per GPU", *header], lines)


TRANSPORTS = ("NCCL", "copy engines", "nothing moves")


# Training ---------------------------------------------------------------------------------------------------------

STAGED = [(1 << 20, 1, 2), (2 << 20, 1, 2), (3700000, 1, 2), (3700000, 1, 4), (5000000, 2, 2), (7000000, 2, 2)]
"""Context, ``checkpoint_every`` and ``keep_last``."""


def memory_staged() -> str:
    """Computed here and now, by the planner, beside what was measured."""
    from seqpar_attn.planner.hardware import LINKS
    from seqpar_attn.planner.memory import predict_memory
    from seqpar_attn.planner.models import MODELS
    from seqpar_attn.planner.plan import make_cluster
    from seqpar_attn.planner.policy import Policy

    measured = {}
    for path in (RESULTS / "memory").glob("*.json"):
        payload = read(path, "memory")
        if payload.get("tile_block"):
            setting = payload["checkpoint_every"], payload["keep_last"]
            measured |= {(row["context"], *setting): row for row in payload["rows"] if "peak_bytes" in row}
    eight, lines = make_cluster(8, LINKS["nvlink4"]), []
    for context, every, last in STAGED:
        options = {"tile_block": 8192, "head_groups": 8, "checkpoint_every": every, "keep_last": last}
        policy = Policy("ring", "recompute", "offload", None, **options)
        found = predict_memory(MODELS["llama-3-8b"], eight, policy, context // 8)
        name = f"{context >> 10}K" if context % 1024 == 0 else str(context)
        cells = [name, f"{every}, {last}", f"{found.total / GIB:.1f} GiB", f"{found.host / GIB:.1f} GiB"]
        row = measured.get((context, every, last))
        cells += [f"{row[key] / GIB:.1f} GiB" for key in ("peak_bytes", "host_bytes")] if row else ["", ""]
        lines.append(cells)
    header = ["context", "`checkpoint_every`, `keep_last`", "GPU memory, computed", "host memory per GPU, computed"]
    return rows_to_table([*header, "GPU memory, measured", "host memory, measured"], lines)


MODEL_NAMES = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B", "llama-2-13b": "Llama-2-13B"}


def memory_files() -> list[Path]:
    """By model, policy and context; blocks in stages have a table of their own."""

    def order(path: Path) -> tuple[int, bool, int, str]:
        payload = read(path, "memory")
        contexts = [row["context"] for row in payload["rows"]]
        model = list(MODEL_NAMES).index(payload["model"])
        return model, payload["attention"] != "save", min(contexts, default=0), path.name

    def is_shown(path: Path) -> bool:
        payload = read(path, "memory")
        return payload["model"] in MODEL_NAMES and not payload.get("tile_block")

    return sorted(filter(is_shown, (RESULTS / "memory").glob("*.json")), key=order)


def _memory_rows() -> Iterator[tuple[dict[str, Any], dict[str, Any], list[str]]]:
    for path in memory_files():
        payload = read(path, "memory")
        for row in payload["rows"]:
            if "peak_bytes" in row:
                tokens = row["context"] // payload["gpus"]
                name = [MODEL_NAMES[payload["model"]], f"{row['context'] // 1024}K", str(tokens)]
                inputs = "" if payload["activations"] == "offload" else f", inputs {payload['activations']}"
                yield payload, row, [*name, payload["attention"] + inputs]


def memory() -> str:
    lines = []
    for _, row, cells in _memory_rows():
        cells += [f"{row[key] / GIB:.1f} GiB" for key in ("peak_bytes", "host_bytes")]
        if "step_ms" in row:
            cells += [f"{row[key] / 1e3:.1f} s" for key in ("step_ms", "attention_ms")]
            cells += [f"{row['tokens_per_second']:.0f} tokens/s", f"{100 * row['mfu']:.1f}%"]
        lines.append(cells + [""] * (10 - len(cells)))
    header = ["model", "context", "tokens per GPU", "attention", "peak", "host memory", "step", "of it attention"]
    return rows_to_table([*header, "8 GPUs", "MFU of 989 TFLOP/s"], lines)


def memory_peaks() -> str:
    lines = []
    for _, row, cells in _memory_rows():
        peak, rest, reserved, host = (
            f"{row[key] / GIB:.1f}" for key in ("peak_bytes", "static_bytes", "reserved_bytes", "host_bytes")
        )
        lines.append([*cells, f"{peak} GiB ({rest})", f"{reserved} GiB", f"{host} GiB"])
    header = ["model", "context", "tokens per GPU", "attention", "peak (at rest)", "reserved by the allocator"]
    return rows_to_table([*header, "host memory"], lines)


def memory_times() -> str:
    rows = [row for payload, row, _ in _memory_rows() if "step_ms" in row and payload["model"] == "llama-2-7b"]
    rows.sort(key=lambda row: row["context"])

    def line(name: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(value(row) for row in rows)]

    what = "step: forward and backward of all layers, embedding, head, optimizer"
    return rows_to_table(
        line("Llama-2-7B, attention saved", lambda row: f"{row['context'] // 1024}K"),
        [
            line(what, lambda row: f"{row['step_ms'] / 1e3:.1f} s"),
            line("of it attention", lambda row: f"{row['attention_ms'] / 1e3:.1f} s"),
            line("8 GPUs if all transfers are hidden", lambda row: f"{row['tokens_per_second']:.0f} tokens/s"),
            line("of 989 TFLOP/s", lambda row: f"{100 * row['mfu']:.1f}%"),
        ],
    )


GPU_NAMES = {"a100-80g": "A100", "h100-80g": "H100", "h200": "H200"}


def one_rank() -> str:
    """EasyContext's table: what it reports, what one rank measured, and what the planner predicts."""
    payload = result("one_rank/one_rank", "one_rank")
    lines = []
    for row in payload["rows"]:
        theirs = row["theirs"]
        cells = [row["row"].replace("-", " "), str(row["tokens_per_gpu"])]
        cells += [f"{theirs[0]}, {100 * theirs[1]:.1f}%" if theirs else "-"]
        one = row["measured"]
        cells += [f"{one['tokens_per_second']:.0f}, **{100 * one['mfu']:.1f}%**" if "mfu" in one else "not run"]
        of_gpu = {x["gpu"]: x for x in row["predictions"]}
        for gpu in GPU_NAMES:
            x = of_gpu[gpu]
            times = f", x {x['mfu'] / theirs[1]:.2f}" if theirs and gpu == "a100-80g" else ""
            cells.append(f"{x['tokens_per_second']:.0f}, {100 * x['mfu']:.1f}%{times}")
        lines.append(cells)
    found = [row["measured"]["gpu"] for row in payload["rows"] if "mfu" in row["measured"]]
    measured = f"one rank of 8 on one {GPU_NAMES.get(found[0], found[0])}, computed" if found else "one rank of 8"
    header = ["", "tokens per GPU", "EasyContext, 8 A100, published", measured]
    header += [f"8 {name}, *predicted*" for name in GPU_NAMES.values()]
    own = ", ".join(f"{100 * x['model_error']:+.1f}" for row in payload["rows"] if "mfu" in (x := row["measured"]))
    errors = "; ".join(f"{x['what']} {100 * x['error']:+.1f}%" for x in payload["checked"])
    note = f"Predicted over measured step, less 1, on H100s: these rows {own}%; {errors}. "
    note += "On A100 and H200 the planner is not checked."
    return f"{rows_to_table(header, lines)}\n\n{note}"


def throughput() -> str:
    payload = result("throughput/throughput-4", "throughput")
    lines = []
    for row in (x for x in payload["rows"] if "mfu" in x):
        theirs = row["theirs"]
        cells = [row["row"].replace("-", " "), str(row["context"]), str(row["tokens_per_gpu"])]
        cells += [
            f"{row['layers']} of {row['of_layers']}",
            f"{row['peak_bytes'] / GIB:.1f} GiB",
            f"{row['step_s']:.2f} s",
        ]
        cells += [f"{row['tokens_per_second']:.0f}", f"{100 * row['mfu']:.1f}%"]
        lines.append([*cells, f"{100 * theirs[1]:.1f}%" if theirs else "-"])
    header = [
        "EasyContext's row",
        "context here",
        "tokens per GPU",
        "layers",
        "peak",
        "step",
        "tokens/s, 4 GPUs",
        "MFU",
    ]
    return rows_to_table([*header, "EasyContext's MFU, 8 A100"], lines)


# The loss ---------------------------------------------------------------------------------------------------------

LOSSES = {
    "ours_linear_ce": "ours, linear",
    "ours_ce": "ours, logits there",
    "liger_linear_ce": "Liger, linear",
    "liger_ce": "Liger, logits there",
    "torch": "torch",
}


def loss() -> str:
    rows = result("loss/loss", "loss")["linear"]
    lines = []
    for name, title in LOSSES.items():
        cells = [
            f"{row['results'][name]['ms']['median']:.2f}, {row['memory'][name]['above_gradients'] / GIB:.2f}"
            for row in rows
        ]
        lines.append([title, *cells])
    first, *rest = (row["shape"]["vocab"] for row in rows)
    return rows_to_table(["", f"vocabulary {first}, hidden {rows[0]['shape']['hidden']}", *map(str, rest)], lines)


def loss_rows() -> str:
    rows = result("loss/loss", "loss")["logits"]
    lines = []
    for row in rows:
        ms = [f"{row['results'][name]['ms']['median']:.2f} ms" for name in ("ours_ce", "liger_ce")]
        share = [f"{100 * row['of_copy'][name]:.0f}%" for name in ("ours_ce", "liger_ce")]
        lines.append([str(row["shape"]["tokens"]), str(row["shape"]["vocab"]), ms[0], share[0], ms[1], share[1]])
    return rows_to_table(["tokens", "vocabulary", "ours", "of a copy's rate", "Liger", "of a copy's rate"], lines)


# Scale ------------------------------------------------------------------------------------------------------------


def scale() -> str:
    names = {"llama-3-8b": "Llama-3-8B (8 key heads)", "llama-2-7b": "Llama-2-7B (32)"}
    methods = {"ring": "single ring", "double_ring": "double ring", "usp": "USP"}
    found = {
        (model, row["gpus"], row["method"]): row
        for model in names
        for row in result(f"scale/{model}-ib400", "scale")["rows"]
        if row["context"] == 1 << 20
    }
    header = ["GPUs", "tokens per GPU"]
    header += [
        f"{name}: {title}" if n == 0 else title for name in names.values() for n, title in enumerate(methods.values())
    ]
    lines = []
    for gpus in sorted({gpus for _, gpus, _ in found}):
        cells = [str(gpus), str((1 << 20) // gpus)]
        for model in names:
            for method in methods:
                row = found[model, gpus, method]
                waits = sum(row["waiting"].values()) if "mfu" in row else 0.0
                cells.append(f"{100 * row['mfu']:.1f}% ({100 * waits:.0f}%)" if "mfu" in row else "does not fit")
        lines.append(cells)
    return rows_to_table(header, lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "attention": attention,
    "attention-portable": attention_portable,
    "ring": ring,
    "ranks": ranks,
    "transports": transports,
    "memory": memory,
    "memory-staged": memory_staged,
    "memory-peaks": memory_peaks,
    "memory-times": memory_times,
    "one-rank": one_rank,
    "throughput": throughput,
    "loss": loss,
    "loss-rows": loss_rows,
    "scale": scale,
}


def pictures() -> dict[str, list[Path]]:
    """What each is drawn from."""
    return {
        "docs/attention.png": [RESULTS / "cuda" / "attention.json"],
        "docs/memory.png": memory_files(),
        "docs/scale.png": [RESULTS / "scale" / "llama-3-8b-ib400.json"],
    }


def draw(name: str) -> None:
    import drawing

    sources, path = pictures()[name], ROOT / name
    if name == "docs/attention.png":
        drawing.attention(sources[0], path)
    elif name == "docs/memory.png":
        drawing.memory(sources, path)
    else:
        drawing.scale(sources[0], path)


def filled(text: str, where: str) -> str:
    """``text`` with every block made anew; ValueError for a block of no known name or without an end."""
    begins, ends = text.count("<!-- figures:"), text.count("<!-- /figures -->")
    matched = len(BLOCK.findall(text))
    if not begins == ends == matched:
        raise ValueError(f"expected pairs of figures markers in {where}, got {begins} begins and {ends} ends")

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"expected figures in {where} to be one of {', '.join(BLOCKS)}, got {name!r}")
        return f"{begin}\n{BLOCKS[name]()}\n\n{end}"

    return BLOCK.sub(fill, text)


def differences() -> dict[str, str]:
    """Page -> what it should be, of those that are not; pictures are in :func:`stale`."""
    found = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        wanted = filled(text, page)
        if wanted != text:
            found[page] = wanted
    return found


def stale() -> list[str]:
    """Pictures that are missing or drawn from other files."""
    from drawing import fingerprint, fingerprint_of

    return [
        name
        for name, sources in pictures().items()
        if not (ROOT / name).exists() or fingerprint_of(ROOT / name) != fingerprint(sources)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    pages, drawings = differences(), stale()
    for name in (*pages, *drawings):
        print(f"{name} differs from the result files" if arguments.check else f"{name}: written")
    if arguments.check:
        return 1 if pages or drawings else 0
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    for name in drawings:
        draw(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
