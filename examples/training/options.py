"""The options of train.py: EasyContext's names among them, checked before any process talks to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .meter import check_tracker

PARALLEL_MODES = {
    "zigzag_ring_attn": "ring",
    "dist_flash_attn": "dist_flash",
    "ulysses_attn": "ulysses",
    "usp_attn": "usp",
    "data_parallel": "ring",
}
"""EasyContext's names of methods."""

_FREE = {
    "output_dir", "max_train_steps", "save_every", "keep", "resume", "report_to", "wandb", "profile_overhead",
    "peak_tflops", "cache_dir", "no_final", "backend", "method", "parallel_mode", "ring_degree", "sequence_parallel",
    "virtual_ranks", "memory", "activations", "tile_mlp", "compile",
}  # fmt: skip
"""What may change when a run is resumed: it changes no result but by rounding, or none at all."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Every option of train.py."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="meta-llama/Llama-2-7b-hf", help="causal language model: a name on the hub or a folder")
    add("--random-weights", action="store_true", help="only the model's configuration, with weights from --seed")
    add("--tokenizer", help='name or folder, or "bytes"; default: --model')
    add("--dataset", required=True, help="name on the datasets hub, Arrow, Parquet or JSON, or text: a file or folder")
    add("--split", default="train")
    add("--cache-dir", type=Path, help="where tokens are kept; default: --output-dir")
    add("--sft", action="store_true", help="conversations: prompts are not learned, windows hold whole conversations")
    add("--separate-documents", action="store_true", help="no token attends another document (--sft implies it)")
    add("--output-dir", "--output_dir", type=Path, required=True)
    add("--resume", action="store_true", help="go on from the last checkpoint of --output-dir, if there is one")
    add("--batch-size", type=int, default=1, help="windows per data-parallel rank at a time")
    add("--gradient-accumulate-every", type=int, default=8)
    add("--max-train-steps", type=int, default=400)
    add("--seq-length", type=int, default=16384)
    add("--learning-rate", type=float, default=2e-5)
    add("--warmup-steps", type=int, default=0, help="of a rising learning rate, which is constant afterwards")
    add("--weight-decay", type=float, default=0.0)
    add("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
    add("--seed", type=int, default=42)
    add("--rope-theta", "--rope_theta", type=float, help="base of the rotary embedding; default: the model's")
    add("--rope-factor", type=float, help="scaling of the rotary embedding; needs --rope-theta")
    add("--rope-type", choices=("linear", "dynamic", "yarn"), default="linear", help="of --rope-factor")
    add("--pose-context", type=int, help="PoSE: positions skip through a context of so many tokens")
    add("--pose-chunks", type=int, default=2)
    add("--method", help='attention, as seqpar_attn.integrations.transformers.enable takes it; default: "ring"')
    add("--parallel-mode", "--parallel_mode", choices=PARALLEL_MODES, help="the same by EasyContext's names")
    add("--ring-degree", "--ring_degree", type=int, default=1, help="rows of the grid of method usp")
    add("--sequence-parallel", type=int, help="ranks per sequence; default: all, or with data_parallel one")
    add("--virtual-ranks", type=int, help="ranks per sequence inside each process, instead")
    add("--backend", default="auto", help="attention kernels, see python -m seqpar_attn info")
    add("--memory", choices=("save", "offload", "recompute", "none"), default="save", help="attention's results in a "
        "checkpointed block; none: no checkpoints")  # fmt: skip
    add("--activations", choices=("keep", "offload"), default="keep", help="inputs of checkpointed blocks")
    add("--tile-mlp", type=int, help="tokens that an MLP works on at a time")
    add("--compile", action="store_true", help="torch.compile inside the checkpoints")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of products; weights are float32")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0: none but at the end")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--no-final", action="store_true", help="no checkpoint and no safetensors at the end")
    add("--report-to", choices=("none", "tensorboard", "wandb"), default="none")
    add("--wandb", metavar="PROJECT", help="short for --report-to wandb with this project")
    add("--peak-tflops", type=float, help="of one GPU, for MFU; default: by its name")
    add("--profile-overhead", action="store_true", help="wait for the device between parts of a step; print a summary")
    return p


def parse(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The options, checked and with defaults that depend on others filled in. ValueError "expected ..., got ..."."""
    args = parser(description).parse_args(argv)
    if args.method is not None and args.parallel_mode is not None:
        raise ValueError(f"expected --method or --parallel-mode, got {args.method!r} and {args.parallel_mode!r}")
    if args.parallel_mode == "data_parallel":
        if args.sequence_parallel not in (None, 1):
            raise ValueError(f"expected --sequence-parallel 1 with data_parallel, got {args.sequence_parallel}")
        args.sequence_parallel = 1
    args.method = args.method or PARALLEL_MODES.get(args.parallel_mode, "ring")
    if args.ring_degree != 1 and args.method != "usp":
        raise ValueError(f"expected --ring-degree only with method usp, got {args.ring_degree} with {args.method}")
    if args.wandb is not None:
        args.report_to = "wandb"
    check_tracker(args.report_to)
    for name in ("batch_size", "gradient_accumulate_every", "seq_length", "pose_chunks", "keep", "ring_degree"):
        if getattr(args, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} to be at least 1, got {getattr(args, name)}")
    for name in ("max_train_steps", "warmup_steps", "save_every", "weight_decay", "max_grad_norm", "learning_rate"):
        if getattr(args, name) < 0:
            raise ValueError(f"expected --{name.replace('_', '-')} to be at least 0, got {getattr(args, name)}")
    for name in ("sequence_parallel", "virtual_ranks", "tile_mlp", "rope_theta", "rope_factor"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"expected --{name.replace('_', '-')} to be positive, got {getattr(args, name)}")
    if args.rope_factor is not None and args.rope_theta is None:
        raise ValueError(
            f"expected --rope-theta, the base, with --rope-factor, got --rope-factor {args.rope_factor:g} only"
        )
    if args.sft:
        args.separate_documents = True
    if args.pose_context is not None and args.separate_documents:
        raise ValueError(
            "expected --pose-context without --sft and --separate-documents, got both: their positions differ"
        )
    if args.pose_context is not None and not args.pose_chunks <= args.seq_length <= args.pose_context:
        raise ValueError(
            f"expected --pose-chunks <= --seq-length <= --pose-context, got {args.pose_chunks}, {args.seq_length}, "
            f"{args.pose_context}"
        )
    args.tokenizer = args.tokenizer or args.model
    args.cache_dir = args.cache_dir or args.output_dir
    return args


def identity(args: argparse.Namespace, data_size: int, config: Any) -> dict[str, Any]:
    """What makes two runs the same run."""
    found = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name not in _FREE}
    architecture = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    return {**found, "data_parallel": data_size, "architecture": architecture}
