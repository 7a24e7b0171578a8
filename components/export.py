"""Write a policy as one file that runs with torch alone: normaliser, encoder, network, sampler.

python -m components.export runs/x                               # writes runs/x/policy/policy.pt2
python -m components.export runs/x --which best                  # or a step; writes runs/x/policy-step-000002000.pt2
python -m components.export runs/x --policy.sampling-steps 5     # with other inference settings

    program = torch.export.load("policy.pt2").module()
    chunk = program({"observation.state": state})        # [B, Ds] or [B, To, Ds] -> actions [B, Da] or [B, Ta, Da]
    chunk = program({"observation.state": state, "noise": torch.randn(B, 1, 16, 4)})  # of a stochastic policy

Observations are in the environment's units, with their history, the last step being now; so are the actions. The shapes
of everything, and how many steps of a chunk to execute, are stored in the file itself (`torch.export.load(...,
extra_files={"policy.json": ""})`).
"""

import contextlib
import io
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from .acting.policy import Inference, Policy
from .acting.policy_folder import describe
from .errors import UserError
from .run import process
from .run import record as run_record
from .run.checkpoint import run_of
from .run.command_line import asks_for_help, import_for, one_word, parse, parse_names
from .run.policies import Chosen, choose, taken

TOLERANCE = 1e-5  # largest difference from the eager policy, relative to the largest action


@dataclass(kw_only=True)
class Args:
    """Export the policy of a run with torch.export."""

    run: Annotated[str, tyro.conf.Positional, one_word()] = ""
    """Run folder, its policy folder, or that of a checkpoint."""
    which: str = "last"
    """Policy of the run: last, best, or a step that has a checkpoint."""
    plugins: tuple[str, ...] = ()
    """Modules, or Python files, to import first. Name those of the run, too: a run folder may be a stranger's."""
    out: str = ""
    """File to write; by default policy.pt2 beside policy.json, and for a checkpoint, in its run's folder."""
    policy: Inference = Inference()
    """Inference settings; by default those that it was saved with."""


class Whole(nn.Module):
    """Observations in the environment's units -> action or chunk in the environment's units, float32."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.module, self.takes_tensor = policy.module, policy.takes_tensor
        self.normaliser = policy.normaliser.to(torch.device("cpu"))

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        batch = self.normaliser(observation)
        action = self.module(batch["observation.state"] if self.takes_tensor else batch)
        return self.normaliser.undo("action", action.float())


def example(policy: Policy, rows: int) -> dict[str, Tensor]:
    """A batch of `rows` random inputs of the right shapes and typical magnitude."""
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Tensor] = {}
    for key in policy.observation_keys:
        feature = policy.spec[key]
        shape = [rows, *feature.get("stored_shape", feature["shape"])]
        if feature["dtype"] == "uint8":
            batch[key] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            batch[key] = policy.normaliser.undo(key, torch.randn(shape, generator=generator))
    if "task" in policy.spec:
        batch["task_index"] = torch.arange(rows) % len(policy.spec["task"]["values"])
    if hasattr(policy.module, "noise_shape"):
        noise_shape: Any = policy.module.noise_shape
        batch["noise"] = torch.randn(rows, *noise_shape, generator=generator)
    return batch


def description(policy: Policy) -> dict[str, Any]:
    """Metadata of the file: shapes of inputs and outputs without the batch dimension, and inference settings."""
    inputs = {
        k: {"shape": list(v.shape[1:]), "dtype": str(v.dtype).removeprefix("torch.")}
        for k, v in example(policy, 1).items()
    }
    tasks = {"tasks": policy.spec["task"]["values"]} if "task" in policy.spec else {}
    return {"inputs": inputs, "action": list(policy.spec["action"]["shape"]), "inference": policy.inference} | tasks


def export(policy: Policy, path: Path) -> float:
    """Write the policy, load it, and return its largest relative difference from the eager one on batches of 1 and 3.

    Raises:
        UserError: a policy that torch.export cannot trace, or whose exported actions differ; nothing is written then.
    """
    whole = Whole(policy).eval().cpu()
    batch = example(policy, 2)
    rows = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints an incomplete graph there
                program = torch.export.export(whole, (batch,), dynamic_shapes=({key: {0: rows} for key in batch},))
        except Exception as error:
            raise UserError(f"torch.export cannot trace this policy: {str(error).splitlines()[0]}") from error
        temporary = path.with_name(f".{path.name}")
        torch.export.save(program, temporary, extra_files={"policy.json": json.dumps(description(policy))})
        loaded, largest = torch.export.load(temporary).module(), 0.0
        for n in (1, 3):
            batch = example(policy, n)
            eager, exported = whole(batch), loaded(batch)
            largest = max(largest, float((eager - exported).abs().max() / eager.abs().max().clamp(min=1)))
    if not largest <= TOLERANCE:
        temporary.unlink()
        raise UserError(f"the exported policy's actions differ by {largest:.2g} of the largest; nothing is written")
    shutil.move(temporary, path)
    return largest


def destination(run: Path, chosen: Chosen, out: str) -> Path:
    """The file to write; a checkpoint's folder holds what its manifest says, and nothing else.

    Raises:
        UserError: `out` is in no folder, or in a checkpoint's.
    """
    beside = chosen.folder / "policy.pt2"
    if (chosen.folder / "manifest.json").exists():
        beside = run_of(run) / f"policy-step-{chosen.step:09d}.pt2"
    path = Path(out) if out else beside
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no such folder {path.parent}")
    if (path.parent / "manifest.json").exists():
        raise UserError(f"--out {path}: a further file would damage this checkpoint; name one in another folder")
    return path


def main(argv: list[str]) -> int:
    """Load, export and compare the policy; returns the exit code. Raises UserError."""
    run_record.start_logging(rank=0)
    names = parse_names(Args, argv)
    if not names.run:
        if asks_for_help(argv):
            parse(Args, argv, usage="RUN [OPTIONS]")
        raise UserError("which run? It comes first: python -m components.export RUN [OPTIONS]")
    saved, recorded = describe(choose(names.run, names.which).folder)
    import_for(saved.parent, recorded["plugins"], names.plugins)
    policy, chosen = taken(names.run, names.which)
    args = parse(Args, argv, Args(run=names.run, policy=policy.settings), usage="RUN [OPTIONS]")
    policy.configure(**vars(args.policy))
    path = destination(Path(args.run), chosen, args.out)
    print(f"{args.run}: {chosen}")
    difference = export(policy, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to the policy to {difference:.1g}")
    for key, value in description(policy).items():
        print(f"  {key}: {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
