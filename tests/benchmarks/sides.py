"""A process that does nothing but one peer's training step, or one plan, over and over, under a clock (`clock.py`).

`on_gpu.py` starts these beside our scripts; by hand there is nothing to see here.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from clock import Clock, learned  # noqa: E402
from peers import OBS, STATE, Peer, corl, diffusion_policy, jax_agent, lerobot_act, run_script  # noqa: E402

CAMERAS = ("front", "wrist")


def arrays_of(path: Path) -> dict[str, Any]:
    """D4RL's arrays from a file, as the peers take them."""
    import h5py

    with h5py.File(path) as file:
        arrays = {key: file[key][()] for key in ("observations", "next_observations", "actions", "rewards")}
        arrays["terminals"] = file["terminals"][()].astype("float32")
    return arrays | {"masks": 1 - arrays["terminals"]}


def pictures(rows: int, toy: bool) -> dict[str, torch.Tensor]:
    """A batch as ACT takes it: 14 joints, two pictures, a chunk of actions."""
    height, width, steps = (48, 64, 20) if toy else (480, 640, 100)
    batch = {STATE: torch.randn(rows, 14), "action": torch.randn(rows, steps, 14)}
    batch |= {f"observation.images.{name}": torch.randint(0, 256, (rows, 3, height, width)).byte() for name in CAMERAS}
    return batch | {"action_is_pad": torch.zeros(rows, steps, dtype=torch.bool)}


def our_plan(name: str, device: str, toy: bool) -> Peer:
    """One chunk for one observation by our policy, built from the registries as `tests/examples/plain.py` does."""
    from components import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY
    from components.data.features import describe

    cls: Any = TRAINER_REGISTRY[name]
    batch = pictures(1, toy) if name == "act" else {STATE: torch.randn(1, *OBS), "action": torch.randn(1, 16, 2)}
    spec = describe({key: value[0] for key, value in batch.items() if key != "action_is_pad"}, {})
    size = {"size": "small" if toy else "paper"}
    models = torch.nn.ModuleDict()
    if name == "act":
        models["encoder"] = MODEL_BUILDER_REGISTRY["resnet18"]().build(spec)
        spec = models["encoder"].spec
    models["policy"] = MODEL_BUILDER_REGISTRY[cls.needs["policy"]](**size).build(spec)
    more = {"spec": spec, "config": cls.Config()} if name != "act" else {}
    trainer = cls(models, {}, LOSS_BUILDER_REGISTRY[cls.defaults["loss"]]().build(), **more)
    models.to(device).eval()
    policy = trainer.policy().to(device).eval()
    batch.pop("action"), batch.pop("action_is_pad", None)
    observation = {key: value.to(device) for key, value in batch.items()}

    @torch.no_grad()
    def plan() -> Any:
        noise: Any = {}
        if hasattr(policy, "noise_shape"):
            noise = {"noise": torch.randn(1, *policy.noise_shape, device=device)}
        return policy(observation | noise)

    return Peer(plan, learned(models.values()))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["script"]:  # its path, and arguments that are its own
        return run_script(Path(sys.argv[2]), sys.argv[3:])

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("corl", "jax", "unet", "transformer", "act", "our-plan"))
    parser.add_argument("name", help="the algorithm")
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--data", type=Path, help="a D4RL file")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--plan", action="store_true", help="plan a chunk in the place of a training step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how: Any = {"device": device, "bf16": args.bf16, "compiled": args.compile, "toy": args.toy}
    if args.kind == "corl":
        peer = corl(args.name, args.checkout, arrays_of(args.data), args.batch, device, args.compile)
    elif args.kind == "jax":
        peer = jax_agent(args.name, args.checkout, arrays_of(args.data), args.batch)
    elif args.kind == "our-plan":
        peer = our_plan(args.name, device, args.toy)
    else:
        if args.kind == "act":
            imitator = lerobot_act(args.checkout, pictures(args.batch, args.toy), **how)
            observation = {key: value for key, value in pictures(1, args.toy).items() if key.startswith("observation")}
        else:
            imitator = diffusion_policy(args.checkout, args.kind, args.batch, flow=args.name == "flow", **how)
            observation = {STATE: torch.randn(1, *OBS, device=device)}
        peer = Peer(imitator.plan(observation) if args.plan else imitator.step, imitator.learned)

    one = Clock(learned=peer.learned)
    if peer.wait:
        one.wait, one.memory = peer.wait, jax_memory
    whole = args.plan or args.kind == "our-plan"
    while True:
        one.tick()
        result = peer.step()
        if whole:  # a robot waits for its chunk
            result = result[0] if isinstance(result, tuple) else result
            result.cpu()
    return None


def jax_memory() -> float:
    """The most MB that JAX has held on the device; 0 where it does not say."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20


if __name__ == "__main__":
    main()
