#!/usr/bin/env bash
# Llama-2-7B to a context of 512K tokens and more on 8 GPUs of 80 GB, by raising the rotary base with the length:
# 32K -> 64K -> 256K -> 512K. Lengths, bases, steps and data sets are those of EasyContext's own run, about 1M tokens per
# step. Not run by us. A stage that was interrupted goes on where it was; finished stages are skipped.
#
#   examples/scripts/llama2_7b_700k.sh            # all stages; models in out/llama2-7b/*/final
#   examples/scripts/llama2_7b_700k.sh 700k       # instead: five steps at 716800 tokens, for speed and memory
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} MODEL=${MODEL:-meta-llama/Llama-2-7b-hf} OUT=${OUT:-out/llama2-7b}
SHORT=yaofu/slimpajama-per-source-length-upsample
LONG=PY007/slimpajama_llama_tokenized_upsample_4096_chunk

train() {
    torchrun --standalone --nproc-per-node "$GPUS" examples/train.py --tokenizer "$MODEL" --cache-dir "$OUT" \
        --tile-mlp 16384 --report-to tensorboard --peak-tflops "${PEAK:-989}" "$@"
}

if [ "${1:-}" = 700k ]; then
    train --model "$MODEL" --dataset "${LONG}_1M" --seq-length 716800 --rope-theta 1e9 --gradient-accumulate-every 1 \
        --max-train-steps 5 --memory save --activations offload --no-final --output-dir "$OUT/700k"
    exit
fi

previous=$MODEL
stage() { # name, tokens, base, steps, accumulated, learning rate, seed, data set, other options
    if [ ! -e "$OUT/$1/final/config.json" ]; then
        train --model "$previous" --seq-length "$2" --rope-theta "$3" --max-train-steps "$4" \
            --gradient-accumulate-every "$5" --learning-rate "$6" --seed "$7" --dataset "$8" \
            --output-dir "$OUT/$1" --save-every 50 --resume "${@:9}"
    fi
    previous=$OUT/$1/final
}
apart=(--parallel-mode data_parallel)
split=(--method ring --activations offload)

stage 32k-1m     32768 1e6   1000 4 2e-5   42 "$SHORT"       "${apart[@]}"
stage 64k-5m     65536 5e6   1000 2 2e-5 2022 "$SHORT"       "${apart[@]}"
stage 256k-10m  256000 1e7    500 4 2e-5 2023 "${LONG}_256K" "${split[@]}"
stage 256k-25m  256000 2.5e7  500 4 2e-5 2024 "${LONG}_256K" "${split[@]}"
stage 256k-50m  256000 5e7    150 4 2e-5 2025 "${LONG}_256K" "${split[@]}"
stage 512k-100m 512000 1e8    300 2 2e-5 2026 "${LONG}_1M"   "${split[@]}"
stage 512k-250m 512000 2.5e8   90 2 1e-5 2027 "${LONG}_1M"   "${split[@]}"
echo "$previous: for contexts near 1M set its rope_theta to 1e9 in config.json, without training"
