"""Presets: `DistRL` with the defaults of other papers, any of which can be changed.

Those of groups have no critic: one advantage per completion, from its group or from the batch. SAO
has a critic in the group's place.
"""

from typing import Any

from rllib_distrl.algorithm.distrl import DistRL, DistRLConfig


class GroupBaselineConfig(DistRLConfig):
    """What the baselines share: no critic, no bonus, advantages as their stage gives them."""

    def __init__(self, algo_class: type | None = None) -> None:
        """Starts from DistRL and takes the critic out."""
        super().__init__(algo_class=algo_class)
        self.critic = "none"
        self.bonus_coeff = 0.0
        self.whiten_advantages = False


class GRPOConfig(GroupBaselineConfig):
    """Shao et al. 2024 (arXiv 2402.03300): clip 0.2, k3 KL with 0.04, mean of sequence means.

    As a loss k3 has the gradient of KL(reference || policy); the estimator "k2" has that of
    KL(policy || reference), see `maths.losses.kl_estimate`.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or GRPO)
        self.advantage = {"name": "grpo"}
        self.regularisers: list[dict[str, Any]] = [{"name": "kl", "coeff": 0.04, "estimator": "k3"}]
        self.aggregation = "sequence_mean"


class GRPO(DistRL):
    """Group relative policy optimisation: (R - group mean) / group std."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`GRPOConfig`."""
        return GRPOConfig()


class DrGRPOConfig(GroupBaselineConfig):
    """Liu et al. 2025 (arXiv 2503.20783): no std, a constant length divisor, no KL."""

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or DrGRPO)
        self.advantage = {"name": "dr_grpo"}
        self.aggregation = "constant"


class DrGRPO(DistRL):
    """GRPO without its two biases: R - group mean, sums over a constant length."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`DrGRPOConfig`."""
        return DrGRPOConfig()


class RLOOConfig(GroupBaselineConfig):
    """Ahmadian et al. 2024 (arXiv 2402.14740): sequences as actions; KL 0.03 in the reward."""

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or RLOO)
        self.advantage = {"name": "rloo"}
        self.reward_transforms = [{"name": "kl_penalty", "coeff": 0.03}]
        self.aggregation = "sequence_sum"


class RLOO(DistRL):
    """REINFORCE leave-one-out: R - mean of the group's other returns."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`RLOOConfig`."""
        return RLOOConfig()


class ReinforcePlusPlusConfig(GroupBaselineConfig):
    """Hu 2025 (arXiv 2501.03262): KL 0.01 in the reward, whitening over the batch, clip 0.2."""

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or ReinforcePlusPlus)
        self.advantage = {"name": "reinforce_pp"}
        self.reward_transforms = [{"name": "kl_penalty", "coeff": 0.01}]


class ReinforcePlusPlus(DistRL):
    """REINFORCE++: returns to go, whitened over the batch; needs no groups."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`ReinforcePlusPlusConfig`."""
        return ReinforcePlusPlusConfig()


class DAPOConfig(GroupBaselineConfig):
    """Yu et al. 2025 (arXiv 2503.14476): clip 0.2/0.28, dynamic sampling, token mean, overlong.

    The penalty starts where a fifth of the length limit is left, as in the paper.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or DAPO)
        self.advantage = {"name": "grpo"}
        self.clip_param_high = 0.28
        self.reward_transforms = [{"name": "overlong"}]
        self.max_sampling_rounds = 10


class DAPO(DistRL):
    """Decoupled clip and dynamic sampling policy optimisation."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`DAPOConfig`."""
        return DAPOConfig()


class GSPOConfig(GroupBaselineConfig):
    """Zheng et al. 2025 (arXiv 2507.18071): sequence ratios, clipped at 3e-4 and 4e-4."""

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or GSPO)
        self.advantage = {"name": "grpo"}
        self.policy_loss = {"name": "gspo"}
        self.clip_param, self.clip_param_high = 3e-4, 4e-4
        self.aggregation = "sequence_mean"


class GSPO(DistRL):
    """Group sequence policy optimisation."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`GSPOConfig`."""
        return GSPOConfig()


class LADConfig(GroupBaselineConfig):
    """arXiv 2602.20132: Jensen-Shannon divergence, 1/eta = 4, sequence ratio, no clip.

    One optimiser step per batch: a sequence's ratio is a product, which explodes after it.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or LAD)
        self.advantage = {"name": "grpo"}
        self.policy_loss = {"name": "lad"}
        self.aggregation = "sequence_mean"


class LAD(DistRL):
    """Learning advantage distributions: match pi to pi_old exp(A / eta)."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`LADConfig`."""
        return LADConfig()


class SAOConfig(DistRLConfig):
    """arXiv 2607.07508, after notes on it: no code of its authors was to be had.

    One completion a prompt; λ of the policy 1 − 1/(1.5 l), of the critic 1; two passes of the
    critic over a batch, its attention frozen, and ten iterations of it alone at the start; tokens
    whose ratio to the policy that sampled is below .7 or above 6 are left out. The paper's learning
    rates are 1e-6 and, of the critic, 5e-6, for models of billions of parameters. A scalar critic,
    whitened advantages and no bonus are our choice; each part is a setting of `DistRL` of its own.
    Rollouts become asynchronous by `num_env_runners` and `[rollout] max_staleness`.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the paper's defaults."""
        super().__init__(algo_class=algo_class or SAO)
        self.rollout(num_generations=1)
        self.n_quantiles = 1
        self.bonus_coeff = 0.0
        self.advantage = {"name": "length_gae", "alpha": 1.5}
        self.policy_loss = {"name": "double_sided", "clip_param": 0.3, "clip_param_high": 5.0}
        self.critic_epochs: int | None = 2
        self.critic_freeze = "attention"
        self.critic_warmup_iterations = 10


class SAO(DistRL):
    """Policy gradient with a critic from single completions, of policies that may be old."""

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`SAOConfig`."""
        return SAOConfig()
