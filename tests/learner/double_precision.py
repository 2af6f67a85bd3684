"""A module and learners for comparisons: float64 throughout, and plain gradient descent."""

import torch

from rllib_distrl.learner.distrl_learner import DistRLLearner
from rllib_distrl.model.causal_lm_module import DistRLModule

SGD_LR = 0.5


class DoubleModule(DistRLModule):
    """`DistRLModule` in float64, norms too, which Transformers computes in float32."""

    def setup(self):
        super().setup()
        self.double()
        for part in self.modules():
            if type(part).__name__.endswith("RMSNorm"):
                part.forward = _norm.__get__(part)


def _norm(self, states):
    variance = states.square().mean(-1, keepdim=True)
    return self.weight * (states * torch.rsqrt(variance + self.variance_epsilon))


class SgdLearner(DistRLLearner):
    """`DistRLLearner` whose steps are proportional to gradients."""

    def configure_optimizers_for_module(self, module_id, config=None):
        parameters = [p for p in self.module[module_id].parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=SGD_LR)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=parameters, lr_or_lr_schedule=SGD_LR
        )
