#!/usr/bin/env bash
# What train.py costs outside the model (sharding, loss bookkeeping, reports) at 64K tokens on one GPU: a Llama of 1.1
# billion random weights on this checkout's own text. The last line says the share; the aim is less than 2%.
#
#   examples/scripts/overhead.sh [other options of train.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
export PYTHONPATH=$PWD
PYTHON=${PYTHON:-python3}
"$PYTHON" - "$OUT/model" <<'CONFIG'
import sys
from transformers import LlamaConfig
LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, architectures=["LlamaForCausalLM"],
).save_pretrained(sys.argv[1])
CONFIG
"$PYTHON" examples/train.py --model "$OUT/model" --random-weights --tokenizer bytes --dataset seqpar_attn \
    --seq-length 65536 --gradient-accumulate-every 1 --max-train-steps 6 --memory save --activations keep \
    --no-final --profile-overhead --output-dir "$OUT/run" "$@"
