"""Critics apart from their policy: one in a folder, and an ensemble of small ones.

A critic on its own is a folder with `config.json` and `critic.safetensors`. It holds the trunk that
reads the tokens and the head on top of it, so it says as much as the critic did, whatever policy it
is put beside. Our format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, pad, scaled_dot_product_attention

from distrl_envs.task import MOST_CRITIC_NUMBERS
from rllib_distrl.method.critic import head_identity

FORMAT = "distrl-critic-1"
CONFIG, WEIGHTS = "config.json", "critic.safetensors"
TRUNK, HEAD, OBSERVED = "critic.", "value_head.", "observation_head."
"""Prefixes of the names in the file, which are those in `CausalLMModule`."""
PARTS = TRUNK, HEAD, OBSERVED
TWIN_SPREAD = 0.1
"""By how much twin critics' raw outputs differ at the start, about (our choice)."""
OBSERVATION_WIDTH = 64
"""Hidden units of what reads a critic's observations (our choice)."""


def save_critic(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    head: str | Mapping[str, Any],
    n_quantiles: int,
    head_center: str,
    trunk_config: Mapping[str, Any],
    critic_observation: str = "none",
    critic: str = "separate",
) -> None:
    """Writes a critic.

    Args:
        path: The folder; made if it is missing.
        tensors: Trunk and head, by the names of `CausalLMModule`.
        head: As in `[training]`.
        n_quantiles: N.
        head_center: What the centre of the head is: `mean` or `median`.
        trunk_config: Of the trunk, as Transformers writes it.
        critic_observation: What it sees beside the tokens, as in `[training]`.
        critic: "separate", or "twin" for two.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS
    )
    config = {
        "format": FORMAT,
        **head_identity({"head": head, "n_quantiles": n_quantiles, "head_center": head_center}),
        **({} if critic_observation == "none" else {"critic_observation": critic_observation}),
        **({} if critic == "separate" else {"critic": critic}),
        "trunk": dict(trunk_config),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_critic_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a critic.

    Raises:
        ValueError: If the folder holds no critic.
    """
    try:
        config = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no critic: its {CONFIG} is missing or of another format than "
            f"{FORMAT!r}. Make one with `distrl export RUN OUT --critic`."
        )
    return config


def check_critic(
    path: str | Path,
    *,
    head: str | Mapping[str, Any],
    n_quantiles: int,
    head_center: str,
    critic_observation: str = "none",
    critic: str = "separate",
) -> None:
    """Checks that a critic predicts what a module with these settings does.

    Raises:
        ValueError: If the folder holds no critic, or one with another head or other observations,
            or one in place of two.
    """
    config = read_critic_config(path)
    config = {"head": "quantile", "critic_observation": "none", "critic": "separate", **config}
    wanted = head_identity({"head": head, "n_quantiles": n_quantiles, "head_center": head_center})
    wanted |= {"critic_observation": critic_observation, "critic": critic}
    for name, value in wanted.items():
        if (saved := config.get(name)) != value:
            raise ValueError(
                f"The critic in {str(path)!r} has {name}={saved!r}, the settings say "
                f"{value!r}. Set {name} = {json.dumps(saved)}, or choose another critic."
            )


def load_critic(module: nn.Module, path: str | Path) -> None:
    """Puts a saved critic into a module with a trunk and a head of the same shapes.

    Args:
        module: A `CausalLMModule` whose critic has a trunk of its own.
        path: The folder.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape; the module then is as
            it was.
    """
    file = Path(path) / WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The critic in {file} cannot be read: {error}") from None
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(PARTS)}
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The critic in {str(path)!r} does not fit the model: {name} is {shapes[0]} in "
                f"the folder and {shapes[1]} in the model. Use the model that it was trained on."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def draw_apart(weight: Tensor, seed: int) -> None:
    """Draws the weights of twin critics' heads, (2 K, H), so that the critics differ.

    From N(0, s²/H), s = `TWIN_SPREAD`: trunks are copies of the policy's, and with heads of zeros
    both critics would be one for ever. Our choice; DSAC-T draws its networks whole.

    Args:
        weight: Set in place.
        seed: Of the weights, equal on all learners; torch's own generator is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        weight.copy_(TWIN_SPREAD * drawn / math.sqrt(weight.shape[1]))


class ObservationHead(nn.Module):
    """What a critic's raw outputs gain from numbers that it alone is told.

    Two layers on state and numbers together, so that what a number means may depend on the tokens.
    The last one starts at zero: the critic then says what it would say without. Its form is our
    choice.
    """

    def __init__(self, n_states: int, n_outputs: int, seed: int):
        """Draws the first layer.

        Args:
            n_states: H, width of the states.
            n_outputs: Of the value head.
            seed: Of the weights, equal on all learners; torch's own generator is left alone.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n_inputs = n_states + MOST_CRITIC_NUMBERS
        drawn = torch.randn(OBSERVATION_WIDTH, n_inputs, generator=generator)
        self.inputs = nn.Parameter(drawn / math.sqrt(n_inputs))
        self.bias = nn.Parameter(torch.zeros(OBSERVATION_WIDTH))
        self.output = nn.Parameter(torch.zeros(n_outputs, OBSERVATION_WIDTH))

    @staticmethod
    def joined(states: Tensor, observations: Tensor) -> Tensor:
        """(B, T, H + MOST_CRITIC_NUMBERS) float32, of states and observations (B, T, n)."""
        missing = MOST_CRITIC_NUMBERS - observations.shape[-1]
        return torch.cat([states.float(), pad(observations, (0, missing))], dim=-1)

    def forward(self, joined: Tensor) -> Tensor:
        """(B, T, n_outputs), of `joined`."""
        return linear(gelu(linear(joined, self.inputs, self.bias)), self.output)


class _Blocks(nn.Module):
    """K causal transformers side by side: every weight has a leading axis K."""

    def __init__(
        self, size: int, n_inputs: int, width: int, depth: int, generator: torch.Generator
    ):
        super().__init__()

        def drawn(rows: int, columns: int) -> nn.Parameter:
            noise = torch.randn(size, rows, columns, generator=generator)
            return nn.Parameter(noise / math.sqrt(rows))

        self.inputs = drawn(n_inputs, width)
        self.attention = nn.ParameterList(drawn(width, 3 * width) for _ in range(depth))
        self.up = nn.ParameterList(drawn(2 * width, 4 * width) for _ in range(depth))
        self.down = nn.ParameterList(drawn(4 * width, width) for _ in range(depth))
        self.output = drawn(width, 1)
        self.bias = nn.Parameter(torch.zeros(size, 1, 1, 1))
        self.width = width

    def forward(self, embeddings: Tensor) -> Tensor:
        """One number (K, B, S) per member and position of embeddings (B, S, E)."""
        x = torch.einsum("bse,ked->kbsd", embeddings, self.inputs)
        x = x + _positions(x.shape[2], self.width, x)
        blocks = zip(self.attention, self.up, self.down, strict=True)
        for attention, up, down in blocks:
            q, k, v = (_normed(x) @ attention[:, None]).chunk(3, dim=-1)
            seen = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + gelu(torch.cat([_normed(x), seen], dim=-1) @ up[:, None]) @ down[:, None]
        return (_normed(x) @ self.output[:, None] + self.bias).squeeze(-1)


def _normed(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


def _positions(steps: int, width: int, like: Tensor) -> Tensor:
    """(S, width) sines and cosines (Vaswani et al. 2017)."""
    position = torch.arange(steps, device=like.device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    return torch.cat([(position * rate).sin(), (position * rate).cos()], dim=-1).to(like.dtype)


class Ensemble(nn.Module):
    """Values of K small critics: f_k = g_k + prior_scale · p_k, of which only g_k learns.

    Each p_k is a fixed random network of g_k's form, so that members differ where no data has
    taught them to agree (randomised priors, Osband et al. 2018). They read the policy's input
    embeddings, of which they have trunks of their own: heads on one common trunk disagree little
    where they are wrong. The form of the trunks is our choice.
    """

    def __init__(
        self, n_inputs: int, *, size: int, width: int, depth: int, prior_scale: float, seed: int
    ):
        """Draws the members.

        Args:
            n_inputs: Width of the embeddings.
            size: K ≥ 2.
            width: Of each trunk.
            depth: Blocks of each trunk.
            prior_scale: Of the fixed random networks, in units of the return.
            seed: Of all weights: equal on all learners.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.members = _Blocks(size, n_inputs, width, depth, generator)
        self.priors = _Blocks(size, n_inputs, width, depth, generator).requires_grad_(False)
        nn.init.zeros_(self.members.output)
        self.prior_scale = prior_scale

    def start_at(self, value: float) -> None:
        """Lets all members start around ``value``, in units of the return."""
        with torch.no_grad():
            self.members.bias.fill_(value)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Values (K, B, S) at every position of embeddings (B, S, E), from what precedes it."""
        embeddings = embeddings.detach().float()
        embeddings = embeddings / embeddings.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        with torch.no_grad():
            prior = self.priors(embeddings)
        return self.members(embeddings) + self.prior_scale * prior
