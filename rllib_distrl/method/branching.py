"""Where the completions of a prompt branch off from one another, in tasks that reply.

Some of a group are sampled from the prompt; others begin as one of these, up to a reply, and are
sampled from there on. What is learned from is whole completions all the same: tokens that several
of a group share stand in each of them.
"""

import math

from rllib_distrl.method.registry import register
from rllib_distrl.settings import Count, NotNegative, Positive, Share

NONE = "none"


@register("branching", NONE)
class Unbranched:
    """Every completion is sampled from the prompt."""

    def __init__(self) -> None: ...


@register("branching", "arpo")
class Arpo:
    """ARPO: a reply is a place to branch with probability p + w (H − H₁), until the group is full.

    H is the sum of the entropies of the first tokens of the turn that the reply answers, over
    ln(vocabulary), and H₁ that of the completion's own first turn. Agentic Reinforced Policy
    Optimization (arXiv 2507.19849), whose learner is GRPO's: its soft advantage is what tokens get
    that several completions share. As its authors' code has it: half of the group comes from the
    prompt, p = .5, w = .2, 20 tokens; the paper takes the entropy of the turn behind the reply.
    Whole distributions in place of the ten likeliest tokens, and filling up with completions from
    the prompt all at once, are our choice.
    """

    def __init__(
        self,
        *,
        initial_share: Positive = 0.5,
        branches: Count = 1,
        probability: Share = 0.5,
        entropy_weight: NotNegative = 0.2,
        first_tokens: Count = 20,
    ):
        """Takes the settings.

        Args:
            initial_share: Of a group, at least one, that begins at the prompt.
            branches: Tries to branch at one reply.
            probability: p, where the entropy has not changed.
            entropy_weight: w.
            first_tokens: Of a turn, whose entropies count.

        Raises:
            ValueError: For a share above 1.
        """
        if initial_share > 1.0:
            raise ValueError(
                f"branching 'arpo' has initial_share {initial_share}; it must be in (0, 1]."
            )
        self.branches, self.first_tokens = branches, first_tokens
        self._share, self._probability, self._weight = initial_share, probability, entropy_weight

    def initial(self, size: int) -> int:
        """How many of a group of `size` begin at the prompt."""
        return math.ceil(self._share * size)

    def takes(self, entropy: float, first_entropy: float, uniform: float) -> bool:
        """Whether to branch.

        Args:
            entropy: H.
            first_entropy: H₁.
            uniform: A random number in [0, 1).
        """
        return uniform < self._probability + self._weight * (entropy - first_entropy)
