#!/usr/bin/env bash
# Makes the environments of the libraries we compare ourselves with, apart from our own:
#   benchmarks/trl_environments.sh [FOLDER]      (default: .venv-benchmarks)
# FOLDER/grpo holds the TRL with the present GRPO trainer, FOLDER/ppo the last one with a PPO trainer.
# Torch and Transformers are those of the calling environment, so that only the trainers differ.
set -euo pipefail
folder=${1:-.venv-benchmarks}
torch=$(python -c 'import torch; print(torch.__version__)')
transformers=$(python -c 'import transformers; print(transformers.__version__)')
for pair in grpo:1.16.0 ppo:1.9.2; do
    python -m venv "$folder/${pair%%:*}"
    "$folder/${pair%%:*}/bin/pip" install --quiet \
        "trl==${pair##*:}" "torch==$torch" "transformers==$transformers"
done
