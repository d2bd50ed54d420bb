#!/usr/bin/env bash
# Llama-2-13B on 16 GPUs of 80 GB (two nodes): the stages of llama2_7b_700k.sh with the same bases, and everything that
# waits for the backward pass in host memory. Not run by us. Start it on every node with the same output folder:
#
#   NODES=2 RENDEZVOUS=host0:29500 examples/scripts/llama2_13b_1m.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-2} MODEL=${MODEL:-meta-llama/Llama-2-13b-hf} OUT=${OUT:-out/llama2-13b}
SHORT=yaofu/slimpajama-per-source-length-upsample
LONG=PY007/slimpajama_llama_tokenized_upsample_4096_chunk

previous=$MODEL
stage() { # name, tokens, base, steps, accumulated, learning rate, ranks per sequence, data set
    if [ ! -e "$OUT/$1/final/config.json" ]; then
        torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-backend c10d \
            --rdzv-endpoint "${RENDEZVOUS:-localhost:29500}" examples/train.py \
            --model "$previous" --tokenizer "$MODEL" --seq-length "$2" --rope-theta "$3" --max-train-steps "$4" \
            --gradient-accumulate-every "$5" --learning-rate "$6" --sequence-parallel "$7" --dataset "$8" \
            --method ring --memory offload --activations offload --tile-mlp 16384 --report-to tensorboard \
            --cache-dir "$OUT" --output-dir "$OUT/$1" --save-every 25 --resume
    fi
    previous=$OUT/$1/final
}

# Sequences that fit fewer ranks are shared by fewer: less to send, and the same number of tokens per step.
stage 32k-1m     32768 1e6   1000 4 2e-5  2 "$SHORT"
stage 64k-5m     65536 5e6   1000 4 2e-5  4 "$SHORT"
stage 256k-10m  256000 1e7    500 4 2e-5 16 "${LONG}_256K"
stage 256k-50m  256000 5e7    500 4 2e-5 16 "${LONG}_256K"
stage 512k-100m 512000 1e8    300 2 2e-5 16 "${LONG}_1M"
stage 1m-500m  1024000 5e8     90 1 1e-5 16 "${LONG}_1M"
