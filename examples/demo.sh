#!/usr/bin/env bash
# Demonstrations → behaviour cloning → evaluation → DPPO fine-tuning through RL Zoo → evaluation, in minutes on two cores.
# Usage: examples/demo.sh [SEED [FOLDER]]
set -euo pipefail
seed=${1:-0}
folder=${2:-logs/demo}
mkdir -p "$folder"

echo "=== Behaviour cloning of the bundled Hopper demonstrations"
python -m sb3_dppo.bc --env Hopper-v5 --demos hopper-medium -o "$folder/hopper-bc.zip" --seed "$seed" --epochs 40 \
    --policy-kwargs "net_arch:{'pi': [256, 256, 256]}" --num-threads 1

echo "=== Fine-tuning with DPPO"
python -m rl_zoo3.train --algo dppo --env Hopper-v5 -i "$folder/hopper-bc.zip" -f "$folder" --seed "$seed" \
    -n 350000 --eval-freq -1 --num-threads 1 --progress --verbose 0

echo "=== Evaluation before and after"
run=$(ls -d "$folder"/dppo/Hopper-v5_* | sort -V | tail -n 1)
python examples/compare.py "$folder/hopper-bc.zip" "$run"
