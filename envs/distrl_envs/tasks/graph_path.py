"""Graph path: name a way through an undirected graph; there are usually several."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Turn

if TYPE_CHECKING:
    import numpy as np

LABELS = 100
"""Nodes carry labels 0..99, one token each."""
FEWEST_NODES, MOST_NODES = 4, 20
NODE = r"[0-9]{1,3}"
BETWEEN = r"(?:[ \t]*(?:->|,)[ \t]*|[ \t]+)"
PATH = re.compile(f"{NODE}(?:{BETWEEN}{NODE})*")
BEGUN = re.compile(f"(?:{NODE}(?:{BETWEEN}{NODE})*[ \\t]*(?:->|-|,)?)?")
"""A path as far as it is written."""

Edge = tuple[int, int]


class GraphPathTask(GeneratedTask):
    """Go from one node to another along edges, without visiting a node twice.

    The prompt lists the edges and the two ends, `3 7 , 7 12 , 3 12 ; 3 -> 12 :`; an answer lists
    the nodes of a path, `3 7 12` for instance. Every simple path counts. The ends are connected
    but not neighbours, so an answer has three nodes or more.
    """

    name = "graph_path"
    critic_numbers = ("valid", "arrived", "reachable", "distance", "length")

    def __init__(
        self, split: str = "train", seed: int = 0, nodes: int = 8, edges: int | None = None
    ):
        """Chooses the split, the seed and the size of the graphs.

        Args:
            split: "train", "validation" or "test".
            seed: Which problems are made.
            nodes: Nodes of a graph.
            edges: Edges of a graph; by default half more than it has nodes.

        Raises:
            ValueError: If the split is unknown, `nodes` is outside 4..20, or `edges` is smaller
                than `nodes` - 1 or leaves fewer than 2 pairs of nodes apart.
        """
        super().__init__(split, seed)
        if not FEWEST_NODES <= nodes <= MOST_NODES:
            raise ValueError(
                f"Got nodes={nodes}; Graph path takes {FEWEST_NODES}..{MOST_NODES} nodes."
            )
        most = nodes * (nodes - 1) // 2 - 2
        edges = min(nodes + nodes // 2, most) if edges is None else edges
        if not nodes - 1 <= edges <= most:
            raise ValueError(
                f"Got edges={edges} with nodes={nodes}; it must be in {nodes - 1}..{most}."
            )
        self.nodes = nodes
        self.edges = edges
        self.max_prompt_tokens = 3 * edges + 4  # "a b" and "," or ";", then "a -> b :"
        self.max_completion_tokens = nodes + 1  # the longest simple path, EOS

    @property
    def difficulty(self) -> str:
        """How many nodes and edges."""
        return f"{self.nodes},{self.edges}"

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Draws a graph and two ends, and walks from one to the other."""
        labels = draws.sample(LABELS, self.nodes)
        pairs = list(combinations(range(self.nodes), 2))
        chosen = [pairs[i] for i in draws.sample(len(pairs), self.edges)]
        edges = [(labels[i], labels[j]) for i, j in chosen]
        start, end = labels[0], labels[1]
        if (0, 1) in chosen:
            return None
        path = _walk(edges, start, end, draws.below)
        if path is None:
            return None
        return graph_problem(row, edges, start, end), " ".join(map(str, path))

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """A random simple path, by depth-first search in random order.

        Raises:
            ValueError: If the ends are not connected.
        """
        data = problem.data
        path = _walk(data["edges"], data["start"], data["end"], lambda n: int(rng.integers(n)))
        if path is None:
            raise ValueError(f"No path leads through {problem.prompt!r}.")
        return " ".join(map(str, path))

    def instruction(self, problem: Problem) -> str:
        """The problem in English, with the form of the answer that `grade` expects."""
        data = problem.data
        edges = ", ".join(f"{a}-{b}" for a, b in data["edges"])
        return (
            f"An undirected graph has the edges {edges}. Find a path from {data['start']} to "
            f"{data['end']} that visits no node twice. End with a line that holds nothing but the "
            "nodes of the path, as in: 1 -> 2 -> 3"
        )

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 if the last line is a simple path between the ends along edges, else 0.0.

        Nodes are separated by blanks, commas or arrows.
        """
        last = _last_line(completion)
        path = [int(node) for node in re.findall(NODE, last)] if PATH.fullmatch(last) else None
        answer = " ".join(map(str, path)) if path is not None else None
        if path is not None and _leads(path, problem.data):
            return Grade(1.0, "correct", answer)
        if truncated:
            return Grade(0.0, "too_long", answer)
        return Grade(0.0, "no_answer" if path is None else "wrong", answer)

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """How the path on the last line stands.

        Whether it is a simple path from the start along edges; whether it is at the end; whether
        the end can be reached without visiting a node twice; the fewest further nodes on the way
        there and the nodes so far, as shares of all nodes.
        """
        data, found = problem.data, []
        for text in texts:
            line = _last_line(text)
            path = [int(node) for node in re.findall(NODE, line)]
            valid = BEGUN.fullmatch(line) is not None and _begins(path, data)
            distance = _distance(path, data) if valid else None
            found.append(
                (
                    float(valid),
                    float(valid and path[-1:] == [data["end"]]),
                    float(distance is not None),
                    0.0 if distance is None else distance / self.nodes,
                    len(path) / self.nodes,
                )
            )
        return found


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].replace("→", "->").strip().removesuffix(".")


def graph_problem(row: int, edges: Sequence[Edge], start: int, end: int) -> Problem:
    """The problem of going from `start` to `end` along `edges`, as it is shown."""
    shown = " , ".join(f"{a} {b}" for a, b in edges)
    # The order of edges and of ends does not make another problem: one key, one split.
    listed = ",".join(f"{a}-{b}" for a, b in sorted((min(e), max(e)) for e in edges))
    key = f"{listed}|{min(start, end)}-{max(start, end)}"
    data = {"edges": tuple(edges), "start": start, "end": end}
    return Problem(row, f"{shown} ; {start} -> {end} :", data, key)


def _leads(path: Sequence[int], data: Mapping[str, Any]) -> bool:
    return path[-1] == data["end"] and _begins(path, data)


def _begins(path: Sequence[int], data: Mapping[str, Any]) -> bool:
    """Whether it is a simple path from the start along edges; an empty one is."""
    simple = len(set(path)) == len(path) and path[:1] in ([], [data["start"]])
    known = {frozenset(edge) for edge in data["edges"]}
    return simple and all(frozenset(step) in known for step in pairwise(path))


def _distance(path: Sequence[int], data: Mapping[str, Any]) -> int | None:
    """The fewest nodes that lead on from a simple path to the end; None: none do."""
    neighbours = _neighbours(data["edges"])
    seen = set(path or [data["start"]])
    at, steps = {path[-1] if path else data["start"]}, 0 if path else 1
    while at and data["end"] not in at:
        at = {node for here in at for node in neighbours.get(here, []) if node not in seen}
        seen |= at
        steps += 1
    return steps if at else None


def _neighbours(edges: Sequence[Edge]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for a, b in edges:
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


def _walk(
    edges: Sequence[Edge], start: int, end: int, below: Callable[[int], int]
) -> list[int] | None:
    """A simple path from start to end, trying neighbours in the order that `below` draws.

    Nodes found to be dead ends are not tried again, so that the work is linear in the edges.
    """
    neighbours = _neighbours(edges)
    path, visited = [start], {start}
    while path and path[-1] != end:
        ahead = [node for node in neighbours.get(path[-1], []) if node not in visited]
        if not ahead:
            path.pop()
            continue
        path.append(ahead[below(len(ahead))])
        visited.add(path[-1])
    return path or None
