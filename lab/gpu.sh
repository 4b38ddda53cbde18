#!/usr/bin/env bash
# What only a GPU can say, in at most ten minutes: bash lab/gpu.sh CIFAR OUT
# CIFAR: a folder with train/ and test/ (docs/real-pictures.md); OUT: a folder for logs and sheets.
# Nothing else should use the card.
set -uo pipefail
cd "$(dirname "$0")/.."
cifar=$1 out=$2
mkdir -p "$out"
{
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
    UNCLIP_TEST_GPU=1 timeout 60 python -m pytest -q tests/core/test_gpu.py
    # Each stage's step: share of the peak of matrix products, and memory.
    timeout 40 python -m lab.bench --preset large
    timeout 100 python -m lab.bench --preset large --compile
    # The decoder of CIFAR-10 at a GPU's size, 30M parameters, for the rest of the time.
    timeout 80 python -m lab.classifier --root "$cifar/train" --test "$cifar/test" \
        --epochs 8 --out "$out/classifier.pt"
    timeout 310 python -m lab.bench --preset cifar --compile --minutes 3 --root "$cifar/train" \
        --data folder --weights weights/cifar10 -n 1000 --classifier "$out/classifier.pt" \
        --out "$out" --race \
        "channels=128 multiples=(1,2,2) blocks=2 head_channels=64 batch_size=256 lr=5e-4"
} 2>&1 | tee "$out/gpu.log"
