import re
import time

import pytest

from distrl_envs.grading.extraction import (
    extract_answer,
    last_balanced_box,
    without_unfinished_thinking,
)

CASES = {
    r"so \boxed{42}.": "42",
    r"\boxed{1} then \boxed{2}": "2",
    r"<think>\boxed{43}</think> \boxed{ \frac{1}{2} }": r"\frac{1}{2}",
    r"\boxed{\boxed{7}}": "7",
    r"\boxed{\{1,2\}}": r"\{1,2\}",
    r"\boxed{[0,1\}}": r"[0,1\}",
    r"\boxed{1\}": "1\\",
    r"\boxed 7 apples": "7",
    r"answer: \fbox{3}": "3",
    r"\boxed{1} and \boxed{never closes": "1",
    r"\boxed{never closes": None,
    r"\boxed{}": None,
    "boxed{42}": None,
    "The number 42 appears in the problem. I cannot solve it.": None,
    "The answer is 41, no: the answer is 42.": "42",
    "Answer: 41 was wrong.\nAnswer: **42**": "42",
    "The final answer is $(1, 2)$. I hope it is correct.": "(1, 2)",
    "Work.\n#### 1,234": "1,234",
    "\\boxed{Work.\n#### 1,234}": "1,234",
    # A box anywhere means that boxes are the convention: the phrase does not count then.
    r"The answer is 5. \boxed{6": None,
    "": None,
}


@pytest.mark.parametrize("text, answer", CASES.items())
def test_answers(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, left",
    [
        ("<think>\\boxed{1} but wait", ""),
        ("Sure. <Thinking>so <think> 1", "Sure. "),
        ("<think>1</think> 2", "<think>1</think> 2"),
        ("<think>1</think> 2 <think>3", "<think>1</think> 2 "),
        ("1</think> 2", "1</think> 2"),
        ("return text.split('<think>')", "return text.split('<think>')"),
    ],
)
def test_unfinished_thinking_is_left_out(text, left):
    assert without_unfinished_thinking(text) == left


def test_a_pattern_replaces_the_box():
    pattern = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    text = r"\boxed{1} <answer>2</answer> <answer> 3 </answer>"
    assert extract_answer(text, pattern) == "3"
    assert extract_answer(r"\boxed{1}", pattern) is None


def test_nested_boxes_take_the_one_that_starts_last():
    assert last_balanced_box(r"\boxed{a \boxed{b} c} d}") == "b"


@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "{", "answer is ", "$", r"\boxed{1}", "\\", "answer: $", "\n", "**", "####"],
)
def test_hostile_texts_take_linear_time(piece):
    text = piece * (400_000 // len(piece))
    started = time.process_time()
    extract_answer(text)
    assert time.process_time() - started < 2.0
