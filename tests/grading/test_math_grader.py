import asyncio
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.graders import expressions_per_second, integers_per_second
from distrl_envs.grading import MathGrader

HANGS = r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n}}"
SYMBOLIC = r"\boxed{\sin^2 x+\cos^2 x}"
LATEX = st.lists(
    st.sampled_from(
        [*"0123456789xyzab+-*/^_=<>(){}[],.!|&%$ \n", r"\frac", r"\sqrt", r"\boxed{", r"\pi",
         r"\{", r"\}", r"\left", r"\le", r"\text{and}", r"\begin{pmatrix}", r"\end{pmatrix}",
         r"\infty", r"\pm", r"\cup", "\\\\", "é", "\x00", "\ud83d", "²", "√"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


def test_statuses(grader):
    assert grader.grade(r"\boxed{42}", "42").status == "correct"
    assert grader.grade(r"\boxed{43}", "42").status == "wrong"
    assert grader.grade("no idea", "42").status == "no_answer"
    long = "x+" * 3_000 + "1"
    assert grader.grade(rf"\boxed{{{long}}}", "42").status == "too_long"
    assert {grader.grade(text, "1").score for text in (r"\boxed{1.0}", r"\boxed{2}")} == {1.0, 0.0}


def test_correct_answers_carry_the_form_of_the_gold(grader):
    texts = [r"\boxed{1}", SYMBOLIC, r"\boxed{\frac{2}{2}}", r"\boxed{x=1}"]
    grades = grader.grade_many(texts, ["1.0"] * 4)
    assert {(grade.status, grade.answer) for grade in grades} == {("correct", "1")}


def test_grade_many_keeps_the_order(grader):
    golds = [str(n) for n in range(200)]
    texts = [rf"\boxed{{\sqrt{{{n * n}}}}}" if n % 3 else "none" for n in range(200)]
    statuses = [grade.status for grade in grader.grade_many(texts, golds)]
    assert statuses == ["correct" if n % 3 else "no_answer" for n in range(200)]


def test_an_empty_gold_is_the_users_error(grader):
    with pytest.raises(ValueError, match="no answer"):
        grader.grade(r"\boxed{1}", " $$ ")
    with pytest.raises(ValueError):
        grader.grade_many(["a", "b"], ["1"])


@pytest.mark.parametrize("setting", ["timeout", "workers", "memory_mb", "jobs_per_worker"])
def test_limits_must_be_positive(setting):
    with pytest.raises(ValueError, match=setting):
        MathGrader(**{setting: 0})


def test_a_bad_pattern_is_an_error_at_once():
    with pytest.raises(ValueError, match="regular expression"):
        MathGrader(answer_pattern="(")


def test_an_answer_pattern():
    grader = MathGrader(answer_pattern=r"Result:\s*(\S+)")
    assert grader.grade("Result: 41\nResult: 42", "42").score == 1.0
    assert grader.grade(r"\boxed{42}", "42").status == "no_answer"


def test_a_hanging_comparison_is_killed_and_the_worker_replaced():
    with MathGrader(timeout=0.5, workers=1) as grader:
        assert grader.grade(SYMBOLIC, "1").score == 1.0
        before = grader.pool.pids()
        started = time.monotonic()
        assert grader.grade(HANGS, "1").status == "timeout"
        assert time.monotonic() - started < 10.0
        assert grader.pool.pids() != before
        assert not _alive(before[0])
        assert grader.grade(r"\boxed{x-x}", "0").score == 1.0


def test_a_worker_that_dies_on_a_job_is_reported_and_replaced():
    with MathGrader(timeout=20.0, workers=1) as grader:
        assert grader.grade(SYMBOLIC, "1").score == 1.0
        pid = grader.pool.pids()[0]
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        assert grader.grade(HANGS, "1").status == "worker_died"
        assert grader.grade(r"\boxed{y-y}", "0").score == 1.0


def test_a_worker_that_died_idle_costs_no_verdict():
    with MathGrader(workers=1) as grader:
        assert grader.grade(SYMBOLIC, "1").score == 1.0
        os.kill(grader.pool.pids()[0], signal.SIGKILL)
        time.sleep(0.1)
        assert grader.grade(r"\boxed{z-z}", "0").score == 1.0


def test_the_memory_limit_holds_and_harms_no_later_verdict():
    with MathGrader(timeout=30.0, workers=1, memory_mb=700) as grader:
        assert grader.grade(SYMBOLIC, "1").score == 1.0
        pid = grader.pool.pids()[0]
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (700 << 20, 700 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 700 << 20))
        started = time.monotonic()
        # math-verify hides some lacks of memory, which then read as a wrong answer.
        assert grader.grade(HANGS, "1").status in ("worker_died", "wrong")
        assert time.monotonic() - started < 10.0
        resource.prlimit(pid, resource.RLIMIT_AS, (700 << 20, 700 << 20))
        assert grader.grade(r"\boxed{w-w}", "0").score == 1.0


def test_workers_are_recycled():
    with MathGrader(workers=1, jobs_per_worker=3) as grader:
        pids = set()
        for n in range(7):
            assert grader.grade(rf"\boxed{{a+{n}-a}}", str(n)).score == 1.0
            pids.update(grader.pool.pids())
        assert len(pids) == 3


def test_verdicts_are_remembered():
    with MathGrader(workers=1) as grader:
        assert grader.grade(SYMBOLIC, "1").score == 1.0
    # Closed: a worker would have to be started for anything new.
    assert grader.grade(SYMBOLIC, "1").score == 1.0
    assert grader.pool.pids() == []


def test_timeouts_are_remembered():
    with MathGrader(timeout=0.5, workers=1) as grader:
        first = grader.grade(HANGS, "1")
        assert first.status == "timeout"
        pids = grader.pool.pids()
        assert grader.grade(HANGS, "1").status == "timeout"
        assert not grader.same_answer("1", first.answer)
        assert grader.pool.pids() == pids  # Nothing ran, nothing was killed.


def test_closing_ends_the_workers():
    with MathGrader(workers=2) as grader:
        grader.grade(SYMBOLIC, "1")
        pids = grader.pool.pids()
        assert len(pids) == 2
    assert not any(map(_alive, pids))


def test_a_parent_that_is_killed_leaves_no_worker():
    program = textwrap.dedent("""
        import sys, threading, time
        from distrl_envs.grading import MathGrader
        grader = MathGrader(timeout=1.0, workers=1)
        grader.grade(r"\\boxed{x+1}", "y")
        hangs = r"\\boxed{\\sum_{n=1}^{10^{9}} \\frac{1}{n}}"
        threading.Thread(target=grader.grade, args=(hangs, "1")).start()
        time.sleep(0.3)
        print(grader.pool.pids()[0], flush=True)
        time.sleep(60)
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                              env=environment)  # fmt: skip
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(pid)


def test_many_threads_share_a_grader(grader):
    wrong = []

    def work(thread):
        for n in range(20):
            value = thread * 100 + n
            if grader.grade(rf"\boxed{{t+{value}-t}}", str(value)).status != "correct":
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_coroutines(grader):
    async def grade_all():
        jobs = [asyncio.to_thread(grader.grade, rf"\boxed{{u+{n}-u}}", str(n)) for n in range(20)]
        return await asyncio.gather(*jobs)

    assert {grade.status for grade in asyncio.run(grade_all())} == {"correct"}


def test_pickles_as_its_settings():
    copy = pickle.loads(pickle.dumps(MathGrader(timeout=1.5, workers=3, answer_pattern="a(.)")))
    assert (copy.timeout, copy.workers) == (1.5, 3)
    assert copy.grade("a7", "7").score == 1.0


@pytest.mark.slow
def test_ray_actors(ray_session):
    import ray

    @ray.remote(num_cpus=0.1)
    class Actor:
        def __init__(self, grader):
            self.grader = grader

        def grade(self, text, gold):
            return self.grader.grade(text, gold).status

    @ray.remote(num_cpus=0.1)
    class AsyncActor(Actor.__ray_metadata__.modified_class):
        async def grade(self, text, gold):
            return (await asyncio.to_thread(self.grader.grade, text, gold)).status

    @ray.remote(num_cpus=0.1)
    class BlockingAsyncActor(Actor.__ray_metadata__.modified_class):
        async def grade(self, text, gold):
            return self.grader.grade(text, gold).status

    for kind in (Actor, AsyncActor, BlockingAsyncActor):
        actor = kind.remote(MathGrader(timeout=2.0, workers=1))
        statuses = [actor.grade.remote(text, "1") for text in (SYMBOLIC, HANGS, r"\boxed{2}")]
        assert ray.get(statuses) == ["correct", "timeout", "wrong"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_graded(grader, text):
    assert grader.grade(text, "42").status in ("correct", "wrong", "no_answer")
    grade = grader.grade(rf"\boxed{{{text}}}", r"\frac{x}{2}")
    assert grade.score == float(grade.status == "correct")


@settings(max_examples=60, deadline=None)
@given(LATEX)
def test_any_latex_is_graded_in_time(grader, text):
    started = time.monotonic()
    grade = grader.grade(rf"\boxed{{{text}}}", r"\sqrt{2}+x")
    assert time.monotonic() - started < grader.timeout + 10.0
    assert grade.score == float(grade.status == "correct")


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.integers())
def test_integers_are_graded_as_integers(grader, gold, answer):
    assert grader.grade(rf"So \boxed{{{answer}}}.", str(gold)).score == float(gold == answer)


@settings(max_examples=300, deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_itself_however_written(grader, value):
    above, below = value.numerator, value.denominator
    texts = [
        f"{above}/{below}",
        rf"\dfrac{{{above}}}{{{below}}}",
        rf"-\frac{{{-above}}}{{{below}}}",
    ]
    grades = grader.grade_many([rf"\boxed{{{text}}}" for text in texts], [str(value)] * 3)
    assert [grade.score for grade in grades] == [1.0, 1.0, 1.0]


def test_integers_need_no_worker():
    own = MathGrader(workers=1)
    own.close()
    _, grades = integers_per_second(own)
    assert sum(grade.score for grade in grades) == 2.0
    # Closed: a worker would have been started for anything that needs one.
    assert own.pool.pids() == []


def test_what_the_benchmark_of_expressions_times_is_right():
    _, grades = expressions_per_second()
    assert all(grade.score == 1.0 for grade in grades)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
