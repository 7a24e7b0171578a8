"""Actions as codes of a learnt codebook, in the manner of VQ-BeT (Lee et al., 2024, arXiv:2403.03181).

An encoder phi, a decoder psi and residual vector quantisation turn an action or a whole chunk a into a code c_l in each
layer l. The r_l are what is left for a layer, the e_l its code vectors:

    r_1 = phi(a),    c_l = argmin_k |r_l - e_l[k]|,    r_(l+1) = r_l - e_l[c_l],    q = sum_l e_l[c_l]

    reconstruction = |psi(q) - a|_1          (L_Recon; the gradient of q passes straight through to phi)
    commitment     = |phi(a) - sg[q]|^2      (van den Oord et al., 2017, arXiv:1711.00937, eq. 3, third term)

The code vectors are means of what they stand for, averaged over updates (the same, appendix A.1), so eq. 3 has no
second term here. The policy learns how probable each code is for an observation o, and what remains of its action:

    code   = focal(c_1 | o) + finer_weight sum_(l > 1) focal(c_l | o, c_<l)       (L_code)
    focal  = -(1 - p)^gamma log p                                               (Lin et al., 2017, eq. 4)
    action = psi(q) + offset(o, q), compared by --loss for the codes of the demonstrated action        (L_offset)

Deviations from the released code of VQ-BeT: everything is learnt at the same time, not the codes first; the codes of a
layer depend on those before it (there an option); the offset is a network of the code vectors, not one output for each
code; and it learns for the codes of the demonstrated action, as the paper says, not for those that are drawn.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..parallel import over_processes
from .encoder import EncodedPolicy

HIDDEN = 128  # units of the encoder, the decoder and the networks that predict, as in VQ-BeT
DECAY = 0.99  # largest decay of the averages
DEAD = 0.01  # a code is dead whose share of the actions is below this part of an equal one
APART = 0.2  # deviations of a cluster between its mean and the code that splits it


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """Options of a codebook of actions."""

    codes: int = 16
    """Codes of a layer of the codebook; 16, as VQ-BeT has them."""
    code_layers: int = 2
    """Layers of the codebook, each of which codes what those before it leave."""
    code_width: int = 64
    """Width of a code's vector."""
    code_weight: float = 0.1
    """Weight of the focal loss of the codes, beside --loss of the action."""
    finer_weight: float = 0.5
    """Weight of the codes after the first layer's in that loss."""
    focal_gamma: float = 2.0
    """Exponent gamma of the focal loss; 0 makes it the cross entropy."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss; that of van den Oord et al."""

    def make_codebook(self, features: int, shape: tuple[int, ...]) -> nn.Module:
        """A head `[B, features]` -> action of `shape`. Raises UserError: bad options."""
        if self.codes < 2 or min(self.code_layers, self.code_width) < 1:
            sizes = f"--model.codes {self.codes} must be 2 or more, --model.code-layers {self.code_layers}"
            raise UserError(f"{sizes} and --model.code-width {self.code_width} positive")
        for name in ("code_weight", "finer_weight", "focal_gamma", "commitment_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--model.{name.replace('_', '-')} {getattr(self, name)} must be a number of 0 or more")
        return CodebookHead(features, shape, self)


class Codebook(nn.Module):
    """Residual vector quantisation with `codes` `[L, K, D]`; its state is the same on all processes.

    `note` counts what is quantised, `learn` moves the codes by what all processes have counted since its last call.
    The first code begins alone. A dead one, which stands for hardly any action, takes a half of the cluster with the
    largest squared error (Linde, Buzo & Gray, 1980), one in each layer at a time; nothing is drawn.
    """

    codes: Tensor
    tally: Tensor
    updates: Tensor
    pending: Tensor
    directions: Tensor

    def __init__(self, layers: int, codes: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("codes", torch.zeros(layers, codes, width))
        # Of each code: its share of the actions, and by that share, the means of r_l and of its square.
        tally = torch.zeros(layers, codes, 1 + 2 * width)
        tally[:, 0, 0] = 1
        self.register_buffer("tally", tally)
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("pending", torch.zeros_like(tally), persistent=False)  # zero between updates
        directions = torch.randn(codes, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[B, L]` of `z` `[B, D]`, their vectors and what they stand for, `[B, L, D]` each; no gradient."""
        rest = z.detach().to(self.codes.dtype)
        chosen, vectors, rests = [], [], []
        for codes in self.codes.unbind():
            index = torch.cdist(rest, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            chosen.append(index)
            vectors.append(codes[index])
            rests.append(rest)
            rest = rest - vectors[-1]
        return torch.stack(chosen, 1), torch.stack(vectors, 1), torch.stack(rests, 1)

    def note(self, chosen: Tensor, rests: Tensor) -> None:
        """Count codes `[B, L]` that stand for `rests` `[B, L, D]`."""
        with torch.no_grad(), torch.autocast(rests.device.type, enabled=False):
            one = functional.one_hot(chosen, self.codes.shape[1]).to(rests.dtype)  # [B, L, K]
            seen = torch.cat([torch.ones_like(rests[..., :1]), rests, rests.square()], 2)
            self.pending += torch.einsum("blk,bld->lkd", one, seen)

    @torch.no_grad()
    def learn(self) -> None:
        """Move the codes by what was counted on all processes since the last call."""
        counted = over_processes(self.pending.clone())
        self.pending.zero_()
        total = counted[0, :, 0].sum()
        keep = torch.where(total > 0, (self.updates / (self.updates + 1)).clamp(max=DECAY), 1.0)
        self.updates += total > 0
        tally = split(keep * self.tally + (1 - keep) * counted / total.clamp(min=1), self.directions)
        share = tally[..., :1]
        self.codes.copy_(torch.where(share > 0, tally[..., 1 : 1 + self.width] / share.clamp(min=1e-12), self.codes))
        self.tally.copy_(tally)

    @property
    def perplexity(self) -> Tensor:
        """How many codes are in use, by the entropy of their shares; mean over the layers."""
        share = self.tally[..., 0]
        return torch.special.entr(share / share.sum(1, keepdim=True)).sum(1).exp().mean()


def split(tally: Tensor, directions: Tensor) -> Tensor:
    """The tally `[L, K, 1 + 2 D]` of a codebook in which the rarest code of a layer, if dead, halves another's cluster.

    Args:
        directions: Of each code `[K, D]`, from the mean of the cluster, in its deviations.
    """
    layers, share = torch.arange(len(tally), device=tally.device), tally[..., 0]
    mean, square = (tally[..., 1:] / share[..., None].clamp(min=1e-12)).chunk(2, 2)
    variance = (square - mean.square()).clamp(min=0)
    halved, dead = (share * variance.sum(2)).argmax(1), share.argmin(1)
    needed = ((share[layers, dead] < DEAD / share.shape[1]) & (halved != dead))[:, None]
    half, spread = tally[layers, halved] / 2, variance[layers, halved]
    place = mean[layers, halved] + APART * spread.sqrt() * directions[dead]
    count = half[:, :1]
    child = torch.cat([count, count * place, count * (spread + place.square())], 1)
    tally = tally.clone()
    tally[layers, halved] = torch.where(needed, half, tally[layers, halved])
    tally[layers, dead] = torch.where(needed, child, tally[layers, dead])
    return tally


class CodebookHead(nn.Module):
    """Features `[B, F]` -> the action of the most probable codes; its own losses are in `auxiliary_weights`."""

    def __init__(self, features: int, shape: tuple[int, ...], options: CodebookOptions) -> None:
        super().__init__()
        self.shape, self.gamma, self.finer_weight = shape, options.focal_gamma, options.finer_weight
        self.auxiliary_weights = {"code": options.code_weight, "reconstruction": 1.0}
        self.auxiliary_weights |= {"commitment": options.commitment_weight, "perplexity": 0.0}  # that is but logged
        size, width = math.prod(shape), options.code_width
        self.codebook = Codebook(options.code_layers, options.codes, width)
        self.encode, self.decode = two_layers(size, width), two_layers(width, size)
        inputs = [features + width * (layer > 0) for layer in range(options.code_layers)]
        self.prior = nn.ModuleList([two_layers(number, options.codes) for number in inputs])
        self.offset = two_layers(features + width, size)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action of the most probable codes or, with noise `[B, L]` from N(0, 1), of codes that it draws."""
        q = features.new_zeros(features.shape[0], self.codebook.width)
        for layer, codes in enumerate(self.codebook.codes.unbind()):
            logits = self.logits(layer, features, q)
            index = logits.argmax(1) if noise is None else drawn(logits, noise[:, layer])
            q = q + codes[index]
        return self.action(features, q)

    def logits(self, layer: int, features: Tensor, q: Tensor) -> Tensor:
        """Unnormalised logarithms `[B, K]` of the probabilities of a layer's codes; `q` sums the vectors before it."""
        return self.prior[layer](torch.cat([features, q], 1) if layer else features)

    def action(self, features: Tensor, q: Tensor) -> Tensor:
        """The decoded action with its offset; the decoder learns by the reconstruction alone."""
        rest = self.offset(torch.cat([features, q], 1))
        return (self.decode(q).detach() + rest).unflatten(1, self.shape)

    def auxiliary(
        self, features: Tensor, target: Tensor, is_pad: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The action of the codes of `target` `[B, (Ta,) Da]`, and the losses; padded steps count as zeros."""
        keep = torch.ones_like(target[..., :1], dtype=torch.bool) if is_pad is None else ~is_pad[..., None]
        target = torch.where(keep, target, 0)
        z = self.encode(target.flatten(1))
        chosen, vectors, rests = self.codebook(z)
        if self.training and torch.is_grad_enabled():
            self.codebook.note(chosen, rests)
        q = vectors.sum(1)
        error = self.decode(z + (q - z).detach()).unflatten(1, self.shape) - target
        before = vectors.cumsum(1) - vectors
        focal = [
            focal_loss(self.logits(layer, features, before[:, layer]), chosen[:, layer], self.gamma)
            for layer in range(len(self.prior))
        ]
        losses = {
            "code": focal[0] + self.finer_weight * sum(focal[1:]),
            "reconstruction": torch.where(keep, error, 0).abs().mean(),
            "commitment": (z - q).square().mean(),
            "perplexity": self.codebook.perplexity,
        }
        return self.action(features, q), losses


def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def focal_loss(logits: Tensor, chosen: Tensor, gamma: float) -> Tensor:
    """Mean of -(1 - p)^gamma log p over samples, p the probability of the `chosen` `[B]` by `logits` `[B, K]`."""
    log_p = logits.log_softmax(1).gather(1, chosen[:, None])
    return -((1 - log_p.exp()).clamp(min=0) ** gamma * log_p).mean()


def drawn(logits: Tensor, noise: Tensor) -> Tensor:
    """The codes `[B]` that noise `[B]` from N(0, 1) draws by `logits` `[B, K]`: the quantile at its probability."""
    below = 0.5 * (1 + torch.erf(noise / math.sqrt(2)))
    return (logits.softmax(1).cumsum(1) <= below[:, None]).sum(1).clamp(max=logits.shape[1] - 1)


# ---- what a trainer does with it -----------------------------------------------------------------------------------


def learn_with(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Let the codebooks of a network learn with its optimizer: after each real step, not after a micro-step."""
    for book in network.modules():
        if optimizer is not None and isinstance(book, Codebook):
            optimizer.register_step_post_hook(lambda *_, book=book: book.learn())


class CodebookPolicy(EncodedPolicy):
    """Encoder and network with a codebook: observations -> the action of the most probable codes, or of drawn ones."""

    samplers = ("mode", "sample")
    most_steps = 1

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__(encoder, network)
        self.sampler, self.sampling_steps = "mode", 1

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One number for each layer of the codebook; there is no such attribute, unless it draws."""
        if self.sampler != "sample":
            raise AttributeError("the most probable codes need no noise")
        head: Any = self.network.head
        return (len(head.prior),)

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        network: Any = self.network
        noise = observation["noise"] if self.sampler == "sample" else None
        return network.head(network.features(self.encoder(observation)), noise)


def acting(encoder: nn.Module, network: nn.Module) -> EncodedPolicy:
    """The policy of a regression network, by the kind of its head."""
    coded = isinstance(getattr(network, "head", None), CodebookHead)
    return (CodebookPolicy if coded else EncodedPolicy)(encoder, network)
