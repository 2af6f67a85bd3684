from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl_envs.task import Problem
from distrl_envs.tasks.graph_path import GraphPathTask, graph_problem

TASK = GraphPathTask()
#   3 - 7 - 12       two ways round a square, and a dead end at 40
#    \     /  \
#      5       40
SQUARE = graph_problem(0, [(3, 7), (7, 12), (5, 3), (12, 5), (12, 40)], 3, 12)


def all_paths(edges, start, end):
    """Every simple path, by trying all orders of all nodes against an adjacency matrix."""
    adjacent = np.zeros((100, 100), bool)
    for a, b in edges:
        adjacent[a, b] = adjacent[b, a] = True
    between = sorted({node for edge in edges for node in edge} - {start, end})
    for length in range(len(between) + 1):
        for middle in permutations(between, length):
            nodes = (start, *middle, end)
            if all(adjacent[a, b] for a, b in pairwise(nodes)):
                yield nodes


def test_every_order_of_nodes_is_graded_as_the_oracle_says():
    task = GraphPathTask(nodes=6)
    several = 0
    for row in range(10):
        problem = task.problem(row)
        data = problem.data
        valid = set(all_paths(data["edges"], data["start"], data["end"]))
        several += len(valid) > 1
        nodes = sorted({node for edge in data["edges"] for node in edge})
        for length in range(1, len(nodes) + 1):
            for order in permutations(nodes, length):
                grade = task.grade(problem, " ".join(map(str, order)))
                assert grade.score == float(order in valid), (problem.prompt, order)
    assert several >= 3


def test_prompt_by_hand():
    assert SQUARE.prompt == "3 7 , 7 12 , 5 3 , 12 5 , 12 40 ; 3 -> 12 :"


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("3 7 12", "correct"),
        ("3 5 12", "correct"),
        ("3 -> 7 -> 12", "correct"),
        ("3→7→12.", "correct"),
        ("3, 5, 12\n", "correct"),
        ("First 3 to 7, then\n3->7->12", "correct"),
        ("3 12", "wrong"),  # no such edge
        ("12 7 3", "wrong"),  # the other way round
        ("3 7 12 40", "wrong"),  # too far
        ("3 7 12 5 3 7 12", "wrong"),  # in circles
        ("3 7 12 40 12", "wrong"),
        ("3", "wrong"),
        ("3 7 12 ;", "no_answer"),
        ("3 7 12 done", "no_answer"),
        ("3 7 12\ndone", "no_answer"),
        ("3 7 12 ->", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_verdicts(completion, status):
    grade = TASK.grade(SQUARE, completion)
    assert grade.status == status
    assert grade.score == float(status == "correct")
    if status == "correct":
        assert grade.answer in ("3 7 12", "3 5 12")


def test_a_cut_completion_is_graded_as_it_stands():
    assert TASK.grade(SQUARE, "3 7 12", truncated=True).status == "correct"
    assert TASK.grade(SQUARE, "3 7", truncated=True).status == "too_long"


def test_search_finds_every_path_and_only_paths():
    rng = np.random.default_rng(0)
    problem = GraphPathTask(nodes=6).problem(0)
    data = problem.data
    paths = {" ".join(map(str, p)) for p in all_paths(data["edges"], data["start"], data["end"])}
    drawn = Counter(TASK.solution(problem, rng) for _ in range(100 * len(paths)))
    assert set(drawn) <= paths
    square = {TASK.solution(SQUARE, rng) for _ in range(50)}
    assert square == {"3 7 12", "3 5 12"}


def test_a_graph_without_a_path_is_reported():
    with pytest.raises(ValueError, match="No path"):
        TASK.solution(graph_problem(0, [(1, 2), (3, 4)], 1, 4), np.random.default_rng(0))


@pytest.mark.parametrize(("nodes", "edges"), [(4, None), (8, None), (20, None), (20, 19), (5, 8)])
def test_problems_keep_to_the_rules(nodes, edges):
    task = GraphPathTask(nodes=nodes, edges=edges)
    rng = np.random.default_rng(0)
    for _ in range(50):
        problem, solution = task.sample_solved(rng)
        data = problem.data
        ends = {data["start"], data["end"]}
        drawn = {frozenset(edge) for edge in data["edges"]}
        assert len(drawn) == len(data["edges"]) == task.edges
        assert all(len(edge) == 2 for edge in drawn)
        assert len({node for edge in data["edges"] for node in edge}) <= nodes
        assert ends not in drawn, "the ends are no neighbours"
        assert task.grade(problem, solution).score == 1.0
        assert task.grade(problem, task.solution(problem, rng)).score == 1.0


def test_the_order_of_edges_and_ends_makes_no_other_problem():
    turned = graph_problem(0, [(12, 40), (12, 7), (3, 7), (5, 3), (5, 12)], 12, 3)
    assert turned.key == SQUARE.key
    assert graph_problem(0, SQUARE.data["edges"], 3, 40).key != SQUARE.key


@given(st.one_of(st.text(), st.text(alphabet="0123456789->, \n")))
def test_grading_never_raises(text):
    grade = TASK.grade(SQUARE, text)
    assert grade.score == float(grade.status == "correct")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "hostile", ["1 " * 100_000 + "x", "1" * 300_000, "3" + " " * 300_000 + "x"]
)
def test_grading_time_is_about_linear(hostile):
    assert TASK.grade(SQUARE, hostile).score == 0.0


@pytest.mark.parametrize("wrong", [{"nodes": 3}, {"nodes": 21}, {"edges": 6}, {"edges": 27}])
def test_impossible_difficulties_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GraphPathTask(**wrong)


def test_the_instruction_names_edges_and_ends():
    text = TASK.instruction(SQUARE)
    assert "3-7, 7-12, 5-3, 12-5, 12-40" in text and "from 3 to 12" in text
    example = graph_problem(0, [(1, 2), (2, 3)], 1, 3)
    assert TASK.grade(example, text.rpartition("as in: ")[2]).score == 1.0
    assert isinstance(example, Problem)


def test_what_a_critic_is_told_of_a_path_by_hand():
    said = {
        # text: valid, arrived, reachable, distance, length (of 8 nodes)
        "": (1, 0, 1, 3, 0),
        "3": (1, 0, 1, 2, 1),
        "3 -> 7 ->": (1, 0, 1, 1, 2),
        "3 7 12": (1, 1, 1, 0, 3),
        "3 7 12 40": (1, 0, 0, 0, 4),  # past the end, which may not be visited twice
        "7": (0, 0, 0, 0, 1),
        "3 12": (0, 0, 0, 0, 2),
        "Go round.\n3 5": (1, 0, 1, 1, 2),
    }
    found = TASK.critic_observation(SQUARE, (), list(said))
    for row, (*flags, distance, length) in zip(found, said.values(), strict=True):
        assert row == pytest.approx((*flags, distance / 8, length / 8))


def test_the_distance_is_that_of_the_shortest_of_all_paths():
    task = GraphPathTask(nodes=6)
    for row in range(10):
        problem = task.problem(row)
        data = problem.data
        shortest = min(map(len, all_paths(data["edges"], data["start"], data["end"])))
        ((*_, distance, _),) = task.critic_observation(problem, (), [str(data["start"])])
        assert distance == pytest.approx((shortest - 1) / 6)
