"""What is made of a critic: its targets, the actor's value, and how uncertain a state is."""

from torch import Tensor

from rllib_distrl.maths.advantages import TARGETS
from rllib_distrl.maths.laws import Law, read_out, uncertainty
from rllib_distrl.maths.optimism import BONUS_STATS
from rllib_distrl.maths.quantiles import READ_OUTS, check_read_out
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.formula import of_batch
from rllib_distrl.method.registry import LEARNED_STATS, register

for _name, _formula in TARGETS.items():
    _unread = ("lambda_",) if _name == "monte_carlo" else ()
    register("target", _name)(
        of_batch(
            _formula,
            renamed={"lambda_": "critic_lambda"},
            without=("projection", "uniforms", *_unread),
        )
    )


def _read_out(name: str) -> None:
    def check(*, level: float | None) -> None:
        check_read_out({"name": name, "level": level})

    @register("read_out", name, needs=("quantiles",), check=check)
    def value(law: Law, *, level: float | None = None) -> Tensor:
        """`maths.laws.read_out`."""
        return read_out(law, name, level)

    value.__qualname__ = name


for _name in READ_OUTS:
    _read_out(_name)


def _of_quantiles(name: str) -> None:
    @register("bonus_statistic", name, needs=("quantiles",))
    def statistic(batch: SequenceBatch) -> Tensor:
        """`maths.laws.uncertainty` of the critic's law."""
        return uncertainty(batch.law, name)

    statistic.__qualname__ = name


def _learned(name: str) -> None:
    @register("bonus_statistic", name, needs=(name,))
    def statistic(batch: SequenceBatch) -> Tensor:
        """What the learner learns beside the critic, see `learner.uncertainty`."""
        return batch.column(name)

    statistic.__qualname__ = name


for _name in BONUS_STATS:
    _of_quantiles(_name)
for _name in LEARNED_STATS:
    _learned(_name)
