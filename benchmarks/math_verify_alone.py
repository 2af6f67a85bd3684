"""A grading worker that has math-verify decide everything, to compare with; see `graders.py`."""

from distrl_envs.grading.worker_loop import serve


def _load():
    from math_verify import parse, verify

    def decide(gold, answer):
        sides = [
            parse(rf"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False)
            for text in (gold, answer)
        ]
        return verify(*sides, timeout_seconds=None, raise_on_error=False)

    return decide


serve(_load)
