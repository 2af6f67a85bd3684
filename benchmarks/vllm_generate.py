"""vLLM's `generate` on the workload; runs in vLLM's environment, once per command.

python vllm_generate.py MODEL_FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from workload import PROMPTS, WORKLOADS, Commands, Stopwatch  # isort: skip

# One thread, which `OMP_NUM_THREADS` says, and the engine in this process, whose time is taken.
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

CACHE_BYTES = 1 << 30
BLOCK = 32  # tokens that a prompt shares at a time; by default as many as 128


def main() -> None:
    commands = Commands()
    folder, workload = sys.argv[1], WORKLOADS[Path(sys.argv[1]).name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(workload.prompt(row))["input_ids"] for row in range(PROMPTS)]
    engine = LLM(
        folder,
        dtype=workload.dtype,
        max_model_len=workload.prompt_tokens + workload.max_tokens,
        kv_cache_memory_bytes=CACHE_BYTES,
        block_size=BLOCK,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    params = SamplingParams(
        n=workload.generations,
        max_tokens=workload.max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
    )

    def generate() -> dict:
        watch = Stopwatch()
        assert engine.reset_prefix_cache()  # As after every update: prompts are computed anew.
        with watch.running():
            done = engine.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
        return watch.measured(sum(len(out.token_ids) for one in done for out in one.outputs))

    commands.serve({"generation": generate})


if __name__ == "__main__":
    main()
