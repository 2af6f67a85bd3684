"""Which of the code in a completion is the program."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from dataclasses import dataclass

from markdown_it import MarkdownIt

from distrl_envs.grading.code_tests import BUILTINS
from distrl_envs.grading.extraction import THINKING, without_unfinished_thinking

PYTHON = re.compile(r"(?:python|py)[\d.]*|ipython|sage", re.IGNORECASE)
LANGUAGE = re.compile(r"\W*([\w.+#-]*)")
DEEP_FENCE = re.compile(r"^(?=(?: {4}|\t)[ \t]*(?:```|~~~))", re.MULTILINE)
LONGEST_READ = 100_000
"""Characters up to which a block is read to see what it defines."""
CODE_LINE = re.compile(r"^(?:def|class|import|from|async def|@\w)", re.MULTILINE)
THINKING_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
# Indented code would hide fences in lists, HTML those after a tag; what is inline is not read.
MARKDOWN = MarkdownIt("commonmark").disable(["code", "html_block", "inline", "text_join"])


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        code: Its text.
        labelled: Whether it says that it is Python.
        defines: Names that it binds at its top level, methods of its classes included.
        uses: Names that it uses and does not bind anywhere.
        acts: Whether it does more than to show values.
    """

    code: str
    labelled: bool
    defines: frozenset[str]
    uses: frozenset[str]
    acts: bool


def extract_program(
    completion: str,
    entry_point: str | None = None,
    names: Collection[str] = (),
    *,
    ignore_unfinished_thinking: bool = True,
) -> str | None:
    """The program of a completion, or None.

    Fenced blocks are found as CommonMark has them (an open one ends with the text), in lists and
    quotations too, after finished thinking if there are any there. Blocks in another language do
    not count. Of the others the last one counts that defines what is asked for, where nothing is
    asked for the last one in Python; to it belong, in their order, the other blocks that define
    what it uses. A completion without fences is a program itself where a line starts like one.

    Args:
        completion: Any text.
        entry_point: The function that is asked for.
        names: Other names that its tests use.
        ignore_unfinished_thinking: Whether what stands in a `<think>` that is never closed is no
            program.
    """
    if ignore_unfinished_thinking:
        completion = without_unfinished_thinking(completion)
    wanted = set(names) | set(re.findall(r"\w+", entry_point or ""))
    thought = list(THINKING_ENDS.finditer(completion))
    if thought:
        program = _program(completion[thought[-1].end() :], wanted)
        if program is not None:
            return program
    return _program(THINKING.sub("\n\n", completion), wanted)


def _program(text: str, wanted: set[str]) -> str | None:
    found, fenced = _blocks(text)
    if not found:
        return text if not fenced and CODE_LINE.search(text) else None
    if len(found) == 1:
        return found[0][0]
    blocks = [_block(code, labelled) for code, labelled in found]
    most = max(len(block.defines & wanted) for block in blocks)
    able = [block for block in blocks if len(block.defines & wanted) == most]
    if not most:
        able = (
            [block for block in able if block.labelled and block.acts]
            or [block for block in able if block.acts]
            or [block for block in able if block.labelled]
            or able
        )
    return _with_what_it_uses(able[-1], blocks)


def _with_what_it_uses(chosen: Block, blocks: list[Block]) -> str:
    taken = {id(chosen)}
    needed = set(chosen.uses)
    while True:
        defining = [
            block for block in blocks if id(block) not in taken and block.defines & needed
        ]  # fmt: skip
        if not defining:
            return "\n".join(block.code for block in blocks if id(block) in taken)
        # The last one that defines a name is the one that counts.
        block = defining[-1]
        taken.add(id(block))
        needed = (needed - block.defines) | (block.uses - chosen.defines)
        needed -= {name for other in blocks if id(other) in taken for name in other.defines}


def _blocks(text: str) -> tuple[list[tuple[str, bool]], bool]:
    """What may be Python, each with whether it says so, and whether there are fences at all."""
    # In CommonMark a fence that is indented by four does not end a paragraph; models write it so.
    text = DEEP_FENCE.sub("\n", text)
    fences = [token for token in MARKDOWN.parse(text) if token.type == "fence"]
    blocks = []
    for fence in fences:
        found = LANGUAGE.match(fence.info)
        language = found.group(1) if found else ""
        labelled = PYTHON.fullmatch(language) is not None
        if fence.content.strip() and (labelled or not language):
            blocks.append((fence.content, labelled))
    return blocks, bool(fences)


def _block(code: str, labelled: bool) -> Block:
    try:
        tree = ast.parse(code if len(code) <= LONGEST_READ else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        named = re.findall(r"^[ \t]*(?:def|class)[ \t]+(\w+)", code, re.MULTILINE)
        return Block(code, labelled, frozenset(named), frozenset(), labelled)
    defines: set[str] = set()
    for node in tree.body:
        defines |= _bound_by(node)
    bound = set(defines)
    loaded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    acts = any(
        not (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call | ast.Await))
        for node in tree.body
    )
    uses = frozenset(loaded - bound - BUILTINS)
    return Block(code, labelled, frozenset(defines), uses, acts)


def _bound_by(node: ast.stmt) -> set[str]:
    """Names that a statement at the top level binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.ClassDef):
        return {node.name} | {
            part.name for part in node.body if isinstance(part, ast.FunctionDef)
        }  # fmt: skip
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(one.asname or one.name).partition(".")[0] for one in node.names}
    return {
        part.id for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }  # fmt: skip
