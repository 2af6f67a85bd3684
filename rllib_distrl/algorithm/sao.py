"""SAO, single-rollout asynchronous optimisation: one completion a prompt, and a critic for that."""

from rllib_distrl.algorithm.distrl import DistRL, DistRLConfig


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
