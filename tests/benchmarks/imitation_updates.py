"""How fast ACT and Diffusion Policy learn and act at their published sizes, against the code that published them.

python tests/benchmarks/imitation_updates.py
python tests/benchmarks/imitation_updates.py --diffusion-policy PATH --lerobot PATH --compile --json rows.json

The paths are checkouts of real-stanford/diffusion_policy (pip install einops diffusers) and of huggingface/lerobot (pip
install einops). A training step is loss, backward, clipping where the peer clips, AdamW and averaged weights where the
peer has them, on one batch that stays the same: the U-Net 256/512/1024 (65.8M) at batch 256,
chunks of 16 x 2 for observations 2 x 20; ACT (40M) at batch 8, chunks of 100 x 14, states alone. An action chunk is
DDIM in 10 steps, or ACT at z = 0. Everything runs on one thread of one process, in turns, in reverse order every
second round, after a round that does not count; a ratio is the median of the rounds' own ratios. "switch" is
`torch.set_float32_matmul_precision("medium")`. `--memory` runs each training step in a process of its own and tells the
most memory that it held.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from measuring import Figure, compare, describe_machine, measure  # noqa: E402
from peers import OBS, diffusion_policy, lerobot_act  # noqa: E402

from components import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY, optimizers  # noqa: E402
from components.optimizers import AdamW  # noqa: E402
from components.speed.compile import compile_losses  # noqa: E402

ACT_STATE, ACTION = 14, 14
UNET = {"observation.state": {"shape": OBS}, "action": {"shape": (16, 2)}}
ACT = {
    "observation.state": {"shape": (ACT_STATE,)},
    "observation.environment_state": {"shape": (ACT_STATE,)},
    "action": {"shape": (100, ACTION)},
}
COMPILED = ", compiled"
GOALS = {"ACT step": 2.2, "U-Net step": 1.7, f"U-Net step{COMPILED}": 1.9}
GOALS |= {"DDIM-10, batch 1": 2.5, "DDIM-10, batch 50": 1.6, "ACT chunk, batch 1": 1.8, "ACT chunk, batch 50": 1.8}
BEYOND = {"ACT step": 2.8, "U-Net step": 2.4}


def batch_of(spec: dict[str, Any], rows: int) -> dict[str, torch.Tensor]:
    """A random batch, no step padded."""
    batch = {key: torch.randn(rows, *feature["shape"]) for key, feature in spec.items()}
    return batch | {"action_is_pad": torch.zeros(rows, spec["action"]["shape"][0], dtype=torch.bool)}


# ---- ours ----------------------------------------------------------------------------------------------------------


def our_trainer(name: str, spec: dict[str, Any], compiled: bool = False) -> Any:
    """The trainer at the published size, with the optimizer, clipping and averages that its peer has."""
    torch.manual_seed(0)
    cls: Any = TRAINER_REGISTRY[name]
    models = nn.ModuleDict({"policy": MODEL_BUILDER_REGISTRY[cls.needs["policy"]](size="paper").build(spec)})
    optimizer = AdamW(lr=1e-4, weight_decay=1e-4).build(models["policy"].parameters())
    loss = LOSS_BUILDER_REGISTRY[cls.defaults["loss"]]().build()
    if name == "act":
        trainer = cls(models, {"policy": optimizer}, loss)
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(models.parameters(), 10.0) and None)
    else:
        trainer = cls(models, {"policy": optimizer}, loss, spec=spec, config=cls.Config(prediction="epsilon"))
        optimizers.averages(models, {"policy": optimizer}, 0.9999)
    if compiled:
        compile_losses(trainer, torch.device("cpu"))
    return trainer


def our_chunk(trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Plan one chunk for a batch of observations."""
    policy = trainer.policy()

    def plan() -> Any:
        trainer.models.eval()
        noise = {}
        if hasattr(policy, "noise_shape"):
            noise = {"noise": torch.randn(len(batch["action"]), *policy.noise_shape)}
        with torch.no_grad():
            return policy(batch | noise)

    return plan


# ---- measuring -----------------------------------------------------------------------------------------------------


def repeated(step: Callable[[], Any], times: int, switch: str) -> Figure:
    """The rate of a step, after one that does not count."""

    def rate() -> float:
        torch.set_float32_matmul_precision(switch)
        step()
        began = time.process_time()
        for _ in range(times):
            step()
        return times / (time.process_time() - began)

    return rate


def training(trainer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Our training step."""

    def step() -> None:
        trainer.models.train()
        trainer.train_step(batch)

    return step


def tasks(args: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None, int]]:
    """Name -> our step, the peer's or None, and how often it is repeated in a round."""
    unet_step = unet_chunk = act_step = act_chunk = None
    if args.diffusion_policy:
        unet_step, unet_chunk, _ = diffusion_policy(args.diffusion_policy)
    if args.lerobot:
        act_step, act_chunk, _ = lerobot_act(args.lerobot, batch_of(ACT, 8))
    unet, act = our_trainer("diffusion", UNET), our_trainer("act", ACT)
    made: dict[str, Any] = {"U-Net step": (training(unet, batch_of(UNET, 256)), unet_step, 1)}
    if args.compile:
        compiled = our_trainer("diffusion", UNET, compiled=True)
        made[f"U-Net step{COMPILED}"] = (training(compiled, batch_of(UNET, 256)), unet_step, 1)
    made["ACT step"] = (training(act, batch_of(ACT, 8)), act_step, 2)
    for rows, times in ((1, 5), (50, 1)):
        one, other = batch_of(UNET, rows), batch_of(ACT, rows)
        made[f"DDIM-10, batch {rows}"] = (our_chunk(unet, one), unet_chunk and unet_chunk(one), times)
        made[f"ACT chunk, batch {rows}"] = (our_chunk(act, other), act_chunk and act_chunk(other), 4 * times)
    return {name: task for name, task in made.items() if args.only in name}


def memory(args: argparse.Namespace) -> None:
    """Print the most memory that each training step needed, in MB, each in a process of its own."""
    peers = (("U-Net step", "--diffusion-policy", args.diffusion_policy), ("ACT step", "--lerobot", args.lerobot))
    for name, option, path in peers:
        for whose in ("ours", "peer") if path else ("ours",):
            words = [sys.executable, __file__, "--only", name, "--hold", whose, *([option, str(path)] if path else ())]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            print(f"{name:22} {whose:5} {done.stdout.strip()} MB at most")


def hold(args: argparse.Namespace) -> None:
    """Three training steps of one side alone, and the most memory of this process in MB."""
    make: dict[tuple[str, str], Callable[[], Callable[[], Any]]] = {
        ("U-Net step", "ours"): lambda: training(our_trainer("diffusion", UNET), batch_of(UNET, 256)),
        ("U-Net step", "peer"): lambda: diffusion_policy(args.diffusion_policy).step,
        ("ACT step", "ours"): lambda: training(our_trainer("act", ACT), batch_of(ACT, 8)),
        ("ACT step", "peer"): lambda: lerobot_act(args.lerobot, batch_of(ACT, 8)).step,
    }
    step = make[args.only, args.hold]()
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--diffusion-policy", type=Path, help="checkout of real-stanford/diffusion_policy")
    parser.add_argument("--lerobot", type=Path, help="checkout of huggingface/lerobot")
    parser.add_argument("--json", type=Path, help="file for the comparisons; those not made now stay in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also the compiled U-Net; compiling takes minutes")
    parser.add_argument("--memory", action="store_true", help="the most memory of each training step instead")
    parser.add_argument("--only", default="", help="part of the names of what is measured")
    parser.add_argument("--hold", choices=("ours", "peer"), help=argparse.SUPPRESS)  # three steps for --memory
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        return memory(args)
    if args.hold:
        return hold(args)

    describe_machine("cpu")
    figures: dict[str, Figure] = {}
    chosen = tasks(args)
    for name, (ours, peer, times) in chosen.items():
        for switch in ("highest", "medium"):
            figures[f"{name}, ours, {switch}"] = repeated(ours, times, switch)
            if peer:
                figures[f"{name.removesuffix(COMPILED)}, peer, {switch}"] = repeated(peer, times, switch)
    rates = measure(figures, args.rounds)
    print(f"\nmilliseconds: median [min..max] of {args.rounds} rounds")
    for name, values in rates.items():
        times_ms = sorted(1000 / value for value in values)
        print(f"{name:42} {statistics.median(times_ms):9.1f} [{times_ms[0]:.1f}..{times_ms[-1]:.1f}]")
    print("\nours / peer: median [min..max] of the rounds' ratios")
    rows = []
    for name, (_, peer, _) in chosen.items():
        for ours, theirs in (("medium", "highest"), ("medium", "medium"), ("highest", "highest")) if peer else ():
            against = f"{name.removesuffix(COMPILED)}, peer, {theirs}"
            rows.append(compare(rates, f"{name}, ours, {ours}", against, GOALS[name]))
        if name in BEYOND:
            print(f"  beyond: {BEYOND[name]}x")
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else []
        measured = {row["name"]: row for row in [*before, *rows]}
        args.json.write_text(json.dumps(list(measured.values()), indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
