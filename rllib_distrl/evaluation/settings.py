"""How an evaluation samples, and how far it has come."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rllib_distrl.evaluation.summary import default_ks

if TYPE_CHECKING:
    from rllib_distrl.engine.protocol import SamplingParams

# Tokens of one chunk's completions: some hundred megabytes with the texts and Python's overhead.
_CHUNK_TOKENS = 1 << 22
# A small evaluation is cut as well, so that progress shows and a kill costs little.
_CHUNKS_AT_LEAST = 8


@dataclass(frozen=True)
class EvalSettings:
    """What is sampled, and how.

    Attributes:
        problems: The first so many distinct problems; all of a data set that has fewer.
        n: Samples per problem, one pool for every k.
        k: The k of pass@k and maj@k, each at most n; powers of two up to n where empty.
        split: Which problems of a task that has splits.
        max_tokens: Limit of a completion, EOS included; the environment's own where None.
        temperature: Divides the logits.
        top_p: Nucleus; 1 turns it off.
        top_k: Most probable tokens kept; 0 turns it off.
        greedy: Takes the most probable token; more than one sample is then pointless.
        seed: Of the sampling.
        chunk: Problems generated, graded and written at a time: what a kill can lose, and what
            must fit in memory; 0 chooses by the number of tokens.
        max_batch_size: Sequences that the engine runs at once.
        dtype: Of a model given by name; auto is float32 on a CPU and bfloat16 on a GPU.
        distinct_by: What tells correct solutions apart: the normalised answer, or the text where
            one answer is right.
    """

    problems: int = 200
    n: int = 64
    k: tuple[int, ...] = ()
    split: Literal["train", "validation", "test"] = "test"
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    seed: int = 0
    chunk: int = 0
    max_batch_size: int = 256
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    distinct_by: Literal["answer", "completion"] = "answer"

    def validate(self) -> None:
        """Raises ValueError for a setting outside its bounds, with the bound and a remedy."""
        for name, bound in (("problems", 1), ("n", 1), ("max_batch_size", 1), ("chunk", 0)):
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}.")
        for k in self.k:
            if not 1 <= k <= self.n:
                raise ValueError(
                    f"pass@{k} needs 1 <= k <= n and n is {self.n}: raise n or lower k."
                )
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"split must be train, validation or test, got {self.split!r}.")
        if self.distinct_by not in ("answer", "completion"):
            raise ValueError(f"distinct_by must be answer or completion, got {self.distinct_by!r}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}.")
        if self.greedy and self.n > 1:
            raise ValueError(f"greedy samples are all the same, got n = {self.n}: set n = 1.")
        self.sampling(self.max_tokens if self.max_tokens is not None else 1).validate()

    @property
    def ks(self) -> tuple[int, ...]:
        """The k's, ascending."""
        return tuple(sorted(set(self.k))) or default_ks(self.n)

    def sampling(self, max_tokens: int) -> "SamplingParams":
        """The engine's settings for completions of at most ``max_tokens``."""
        # Here, because reports and figures read evaluations without any engine, torch or model.
        from rllib_distrl.engine.protocol import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            greedy=self.greedy,
        )

    def problems_at_once(self, max_tokens: int) -> int:
        """Problems of one chunk: `chunk`, or as many as keep its tokens bounded."""
        if self.chunk:
            return self.chunk
        fits = _CHUNK_TOKENS // (self.n * max_tokens)
        return max(1, min(fits, -(-self.problems // _CHUNKS_AT_LEAST)))

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is sampled; the others may change between runs."""
        free = ("problems", "k", "chunk", "max_batch_size", "distinct_by", "max_tokens", "dtype")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Progress:
    """How far an evaluation has come; passed to ``on_progress`` after every chunk.

    Attributes:
        problems_done: Finished problems, those of an earlier run included.
        problems: Problems in all.
        resumed: Problems that an earlier run had finished.
        samples: Samples drawn in this run.
        tokens: Tokens drawn in this run.
        seconds: Time that this run took for them.
        score: Mean score of the samples of this run, 0 before the first.
    """

    problems_done: int
    problems: int
    resumed: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    score: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the end; None before the first chunk of this run."""
        fresh = self.problems_done - self.resumed
        return self.seconds / fresh * (self.problems - self.problems_done) if fresh else None
