#!/usr/bin/env bash
# Mistral-7B (v0.3, without a sliding window; base 1e6 up to 32K) to 512K on 8 GPUs of 80 GB. Not run by us. Its eight key
# heads make transfers four times smaller than Llama-2's. DATASET: a data set or folder of long texts, for its own
# tokenizer; documents are cut anywhere, so that a window is one long context.
#
#   DATASET=folder-of-books examples/scripts/mistral_7b.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} MODEL=${MODEL:-mistralai/Mistral-7B-v0.3} OUT=${OUT:-out/mistral-7b}
DATASET=${DATASET:?a data set with a column text or input_ids, or a folder of text files}

previous=$MODEL
stage() { # name, tokens, base, steps, accumulated, learning rate, seed, ranks per sequence
    if [ ! -e "$OUT/$1/final/config.json" ]; then
        torchrun --standalone --nproc-per-node "$GPUS" examples/train.py --model "$previous" --tokenizer "$MODEL" \
            --seq-length "$2" --rope-theta "$3" --max-train-steps "$4" --gradient-accumulate-every "$5" \
            --learning-rate "$6" --seed "$7" --sequence-parallel "$8" --dataset "$DATASET" --method ring \
            --activations offload --tile-mlp 16384 --report-to tensorboard --cache-dir "$OUT" \
            --output-dir "$OUT/$1" --save-every 50 --resume
    fi
    previous=$OUT/$1/final
}

stage 64k-5m     65536 5e6   500 4 1e-5 1 2
stage 128k-10m  131072 1e7   500 4 1e-5 2 4
stage 256k-50m  262144 5e7   300 4 1e-5 3 8
stage 512k-100m 524288 1e8   150 2 1e-5 4 8
