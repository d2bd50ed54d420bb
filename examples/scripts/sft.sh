#!/usr/bin/env bash
# Supervised fine-tuning on conversations: rows with messages (or prompt and completion), packed into windows, prompts not
# learned. DATASET: JSON lines, a folder, or a name on the hub; MODEL: one with a chat template.
#
#   MODEL=out/llama2-7b/512k-250m/final DATASET=chats.jsonl SEQ_LENGTH=65536 examples/scripts/sft.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --standalone --nproc-per-node "${GPUS:-8}" examples/train.py --sft --model "${MODEL:?a chat model}" \
    --dataset "${DATASET:?conversations}" --split "${SPLIT:-train}" --seq-length "${SEQ_LENGTH:-65536}" \
    --gradient-accumulate-every 4 --max-train-steps "${STEPS:-400}" --learning-rate 1e-5 --warmup-steps 20 \
    --activations offload --tile-mlp 16384 --output-dir "${OUT:-out/sft}" --save-every 100 --resume
