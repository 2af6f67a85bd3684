"""What README.md shows works as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_blocks_are_the_main_job_and_the_tests():
    (first, main_job), (second, tests) = BLOCKS[:2]
    assert first == second == "sh"
    assert main_job.strip().endswith("distrl train configs/countdown/distrl.toml")
    assert tests.strip().splitlines()[-1] == "pytest -n 2 --dist loadfile"


def test_every_relative_link_exists():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("number", range(2))
def test_python_examples_run(number, capsys):
    example = [text for language, text in BLOCKS if language == "python"][number]
    # The small stand-in is made in seconds; the model in the text takes a minute.
    exec(example.replace("builtin:countdown", "builtin:countdown-tiny"), {})
    assert capsys.readouterr().out.strip()
