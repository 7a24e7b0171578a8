"""DAgger (Ross et al., 2011) and HG-DAgger (Kelly et al., 2019): an expert corrects the policy while it acts.

A clone errs in states that no demonstration shows, and its own errors lead there. So the policy acts, and an expert
says what it would do. DAgger (arXiv:1011.0686, algorithm 3.1) executes, in iteration i, the mixture

    pi_i = beta_i pi* + (1 - beta_i) pi^_i,                 here by a coin at each step, beta_i = beta^i, beta^0 = 1
    D    = D u {(s, pi*(s))},  s of the visited states,     and pi^_{i+1} imitates all of D

With beta 0 the expert acts in the first iteration alone, the paper's version without a parameter. The default is 0.5:
a clone that is stuck does not visit what comes after. On peg-insert-side-v3, one run each with a share of 0.3 and 0.4,
1000 labels made 0.40 of a clone's 0.20, and 0.08 with beta 0. With beta 0, 11 % of 600 labels were of steps after the
grasp; of the demonstrations' steps it is 38 %.

A person cannot label well without steering. In HG-DAgger (arXiv:1810.02890, algorithm 1) the expert takes over where it
deems the state unsafe, steers back, and gives the control back; D gets the steps that it steers alone. A scripted
expert or another policy stands for the person by a gate with hysteresis: it takes over where the policy's action is
farther from its own than `takes_over`, and gives back where it is nearer than `gives_back` (root mean square over the
dimensions, in half ranges of the action).

The loss is that of `bc.py`. The policy begins with a clone (--init-from), or the expert acts first.

Deviations: one policy learns all along, by --updates-per-step, where the papers train a new one on D after each
iteration. HG-DAgger's D also holds the demonstrations, and is drawn as one set; here half of each batch is theirs
(--dataset.ratio), so that few interventions weigh as much as many demonstrations; `--trainer.mix union` is the paper's.
Its policies are ensembles, whose doubt it relates to the interventions; here there is one.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..contracts import Corrections, Place
from ..errors import UserError
from .bc import BC


class DAgger(BC):
    """DAgger and HG-DAgger: an expert corrects the policy while it acts."""

    defaults: dict[str, Any] = BC.defaults | {
        "env": "metaworld",
        # A script switches between actions whose mean is neither. HG-DAgger on peg-insert-side-v3, one run each: 0.60
        # of episodes succeed, 0.38 with mse.
        "loss": "l1",
        "steps": 10_000,
        "online.learning-starts": 200,
        "online.num-envs": 1,
        "online.normalise-observations": True,
        "eval-every": 1000,
    }

    @dataclass(frozen=True)
    class Config:
        """An expert that labels, or corrects, what the policy does."""

        method: Literal["dagger", "hg_dagger"] = "dagger"
        """The expert labels what the policy visits, or takes over where the policy goes wrong."""
        expert: Annotated[str, Place("(?!(?:scripted|keyboard)$)(.+)")] = "scripted"
        """The environment's scripted one; a run folder, or hf://USER/NAME; or keyboard, a person: space takes over and
        gives back, a d, s w, q e, f r, g t, h y, j u, k i and l o move the numbers of the action down and up."""
        labels: int = 4000
        """Actions that the expert gives at most, over all processes; then the policy acts and learns alone."""
        share: float = 1.0
        """Of dagger: share of the visited states that are labelled."""
        beta: float = 0.5
        """Of dagger: in iteration i the expert acts with probability beta^i; 0 for the first one alone."""
        iteration: int = 1000
        """Of dagger: environment steps of an iteration, after the first, which ends when learning starts."""
        takes_over: float = 0.5
        """Of hg_dagger: distance of the policy's action from the expert's beyond which the expert acts."""
        gives_back: float = 0.2
        """Of hg_dagger: distance below which it gives the control back."""
        mix: Literal["method", "union", "share"] = "method"
        """Demonstrations and labels are drawn as from one set (union, by default with dagger), or --dataset.ratio of
        each batch are demonstrations (share, by default with hg_dagger)."""
        rate: float = 10.0
        """Of keyboard: steps per second."""
        speed: float = 1.0
        """Of keyboard: action while a key is pressed, in half ranges."""

    @staticmethod
    def data(config: Any) -> Corrections:  # type: ignore[override]
        """The expert's labels. Raises UserError: options out of range, or of another method or expert."""
        gated, person = config.method == "hg_dagger", config.expert == "keyboard"
        ranges = {"labels": (1, 1e12), "share": (1e-9, 1), "beta": (0, 1), "iteration": (1, 1e12), "rate": (1e-3, 1000)}
        ranges |= {"speed": (1e-9, 1), "takes_over": (0, 1e12), "gives_back": (0, config.takes_over)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(config, name) <= most:
                raise UserError(f"{_option(name)} {getattr(config, name)} must be {least:g} to {most:g}")
        idle = ["share", "beta", "iteration"] if gated else ["takes_over", "gives_back"]
        idle += ["takes_over", "gives_back"] if person else ["rate", "speed"]
        for name in idle:
            if getattr(config, name) != getattr(type(config), name):
                chosen = f"--trainer.method {config.method} and --trainer.expert {config.expert}"
                raise UserError(f"{_option(name)} has no effect with {chosen}; leave it out")
        aggregated = config.mix == "union" or (config.mix == "method" and not gated)
        return Corrections(
            expert=config.expert,
            labels=config.labels,
            gated=gated,
            aggregated=aggregated,
            takes_over=config.takes_over,
            gives_back=config.gives_back,
            share=config.share,
            beta=config.beta,
            iteration=config.iteration,
            rate=config.rate,
            speed=config.speed,
        )


def _option(name: str) -> str:
    """An option of `Config`, as it is typed."""
    return f"--trainer.{name.replace('_', '-')}"
