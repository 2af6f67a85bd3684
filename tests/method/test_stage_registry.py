import numpy as np
import pytest
import torch

from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.registry import KINDS, NEEDS, forget, methods, names, register, resolve

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def batch(**columns):
    defaults = {
        "rewards": torch.tensor([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0], [0.5, 0.25, 9.0]]),
        "loss_mask": MASK,
        "action_logp": torch.zeros(3, 3),
        "group": torch.tensor([7, 7, 9]),
    }
    return SequenceBatch(**{**defaults, **columns})


def registered():
    return {(kind, name) for kind in KINDS for name in names(kind)}


@pytest.fixture
def clean_registry():
    before = registered()
    yield
    for kind, name in registered() - before:
        forget(kind, name)


def test_a_new_method_is_one_decorator(clean_registry):
    @register("shaper", "doubled", needs=("entropy",))
    def doubled(batch, advantages, *, factor=2.0):
        return factor * advantages

    stage = resolve("shaper", {"name": "doubled", "factor": 3.0})
    assert stage(batch(), torch.ones(1)).item() == 3.0
    assert stage.needs == {"entropy"}
    with pytest.raises(ValueError, match="already"):
        register("shaper", "doubled")(test_refusals)


def test_a_method_of_the_users_own_is_named_by_its_module(tmp_path, monkeypatch, clean_registry):
    (tmp_path / "my_stages.py").write_text(
        "from rllib_distrl.method.registry import register\n"
        "def plain(batch, advantages, *, factor: float = 2.0):\n"
        "    return factor * advantages\n"
        "@register('shaper', 'mine', needs=('entropy',))\n"
        "def declared(batch, advantages):\n"
        "    return -advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plain = resolve("shaper", {"name": "my_stages:plain", "factor": np.float64(3.0)})
    assert plain(batch(), torch.ones(1)).item() == 3.0
    declared = resolve("shaper", "my_stages:declared")
    assert (declared(batch(), torch.ones(1)).item(), declared.needs) == (-1.0, {"entropy"})
    with pytest.raises(ValueError, match="no setting 'factr': did you mean 'factor'"):
        resolve("shaper", {"name": "my_stages:plain", "factr": 3.0})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_a_function_of_the_users_own(kind, tmp_path, monkeypatch, clean_registry):
    (tmp_path / "my_methods.py").write_text("def mine(*data, scale: float = 2.0):\n    ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"name": "my_methods:mine", "scale": 3}
    stage = resolve(kind, spec)
    assert (stage.method.kind, stage.settings) == (kind, {"scale": 3.0})
    with pytest.raises(ValueError, match="scale is 'much'; it must be a number"):
        resolve(kind, {**spec, "scale": "much"})


def test_a_method_of_another_kind_is_refused(tmp_path, monkeypatch, clean_registry):
    (tmp_path / "my_losses.py").write_text(
        "from rllib_distrl.method.registry import register\n"
        "@register('group_loss', 'of_groups')\n"
        "def of_groups(logp, batch):\n"
        "    return logp.sum(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # In the place of a policy loss.
    assert resolve("policy_loss", "my_losses:of_groups").method.kind == "group_loss"
    with pytest.raises(ValueError, match="is registered as a group_loss"):
        resolve("shaper", "my_losses:of_groups")


def test_prepare_gets_all_settings_and_needs_a_batch(clean_registry):
    def prepare(batch, *, low, high):
        batch.extras["between"] = (batch.rewards > low) & (batch.rewards < high)

    @register("advantage", "between", prepare=prepare)
    def between(batch, *, low: float = 0.2, high: float = 0.7):
        return batch.column("between").float()

    stage, data = resolve("advantage", {"name": "between", "high": 1.5}), batch()
    stage.prepare(data)
    assert stage(data).tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match="no batch to prepare"):
        register("prompt_sampler", "mine", prepare=prepare)


def test_a_method_with_state_is_a_class():
    first, second = resolve("controller", "adaptive_entropy")(), resolve(
        "controller", {"name": "adaptive_entropy", "step": 1e-3}
    )()  # fmt: skip
    assert first.update(0.1) == pytest.approx(1e-4)
    assert first.update(0.1) == pytest.approx(2e-4)
    assert first.update(0.3) == 0.0  # off above the target, and c moves down
    second.set_state(first.get_state())
    assert second.get_state() == {"coeff": pytest.approx(1e-4)}
    assert second.update(0.1) == pytest.approx(1.1e-3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("grpoo", "did you mean 'grpo'"),
        ({"name": "gae", "lamda_": 0.9}, "did you mean 'lambda_'"),
        ({"name": "zero", "lambda_": 0.9}, "known: none"),
        ({"k": 4}, "needs a name"),
        ({"name": "maxk"}, "needs the setting k"),
        ({"name": "maxk", "k": "8"}, "advantage.maxk.k is '8'; it must be an integer."),
        ({"name": "grpo", "std_epsilon": None}, "std_epsilon is None; it must be a number."),
        (
            {"name": "nowhere_at_all:mine"},
            r"advantage: 'nowhere_at_all:mine' could not be imported: .*No module named",
        ),
        ({"name": "math:pi"}, "'math:pi' is 3.14.*; it must be a function"),
        (
            {"name": "math:mine"},
            "could not be imported: AttributeError: module 'math' has no attribute",
        ),
    ],
)
def test_refusals(spec, words):
    with pytest.raises(ValueError, match=words):
        resolve("advantage", spec)


def test_unknown_kinds_and_needs_are_refused():
    with pytest.raises(ValueError, match="kind"):
        register("advantages", "x")
    with pytest.raises(ValueError, match="needs"):
        register("advantage", "x", needs=("weather",))


def test_needs_may_depend_on_the_settings():
    needs = {s: resolve("shaper", {"name": "pass_at_k", "source": s}).needs
             for s in ("quantiles", "values", "returns")}  # fmt: skip
    assert needs["quantiles"] == {"quantiles", "groups"}
    assert needs["values"] == {"values", "groups"}
    assert needs["returns"] == {"groups"}
    with pytest.raises(ValueError, match="source"):
        resolve("shaper", {"name": "pass_at_k", "source": "luck"})(batch(), torch.zeros(3, 3))


def test_every_registered_method_has_a_docstring_and_known_needs():
    for kind in KINDS:
        for method in methods(kind):
            assert callable(method.needs) or set(method.needs) <= NEEDS
            if kind != "read_out":
                assert method.function.__doc__


def test_rows_of_a_batch():
    whole = batch(extras={"seen": torch.arange(3)}, values=torch.rand(3, 3), k=4)
    for rows in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])):
        part = whole[rows]
        assert len(part) == 2
        assert part.extras["seen"].tolist() == [1, 2]
        assert torch.equal(part.values, whole.values[1:])
        assert (part.k, part.quantiles) == (4, None)
        part.metrics["x"] = 1.0
        assert whole.metrics == {"x": 1.0}
    assert whole.to("cpu").loss_mask.device.type == "cpu"


def test_lengths_and_returns_skip_padding():
    assert batch().lengths.tolist() == [3, 1, 2]
    assert batch().returns.tolist() == [1.0, 2.0, 0.75]


def test_a_missing_column_says_what_there_is():
    with pytest.raises(ValueError, match=r"no column 'values'.*rewards"):
        resolve("advantage", "gae")(batch())


@pytest.mark.parametrize("name", ["os:getcwd", "math:hypot", "textwrap:dedent"])
def test_what_cannot_be_called_as_a_method_of_its_kind_is_refused(name):
    with pytest.raises(ValueError, match=r"regulariser '.*' cannot be called with \(logp, batch\)"):
        resolve("regulariser", name)
