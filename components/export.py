"""Write a policy as one file that runs without this code: normaliser, encoder, network, sampler.

python -m components.export runs/x                               # writes runs/x/policy/policy.pt2, for torch alone
python -m components.export runs/x --which best                  # or a step; writes runs/x/policy-step-000002000.pt2
python -m components.export runs/x --policy.sampling-steps 5     # with other inference settings
python -m components.export runs/x --format onnx                 # policy.onnx, for onnxruntime; or both: pt2 onnx
python -m components.export runs/x --bf16                        # policy.bf16.pt2: weights of half the size
python -m components.export runs/x --check                       # milliseconds of a plan: the policy's, the files'
python -m components.export runs/x --to-hub USER/NAME --licence mit     # uploads it, with a model card

    program = torch.export.load("policy.pt2").module()
    chunk = program({"observation.state": state})        # [B, Ds] or [B, To, Ds] -> actions [B, Da] or [B, Ta, Da]
    chunk = program({"observation.state": state, "noise": torch.randn(B, 1, 16, 4)})  # of a stochastic policy

    session = onnxruntime.InferenceSession("policy.onnx")
    (chunk,) = session.run(["action"], {"observation.state": state, "noise": noise})  # the same, of NumPy arrays

Observations are in the data's units, with their history, the last step being now; so are the actions. Keeping the
history, executing the steps of a chunk, and averaging chunks (`ensemble`) are the caller's. Of several tasks, the
input `task_index` chooses; with `--policy.task TEXT` the file is for that one, which may be a new wording. A sampler is
unrolled: its steps and noise are fixed by the inference settings, and an ONNX file grows by the network's operations
with each of them (not by its weights). What the inputs are, their shapes, units and ranges, the rates, and how many
steps of a chunk to execute, is stored in the file itself: `torch.export.load(..., extra_files={"policy.json": ""})`,
and in ONNX, `session.get_modelmeta().custom_metadata_map["policy.json"]`.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from .acting import latency
from .acting.inference import Inference
from .acting.policy import Policy
from .acting.policy_folder import describe
from .acting.programs import FORMATS, Program, in_bfloat16, traced
from .data.actions import robot_stats
from .data.pictures import is_picture
from .errors import UserError
from .run import process, provenance
from .run import record as run_record
from .run.checkpoint import run_of
from .run.command_line import asks_for_help, import_for, one_word, parse, parse_names
from .run.hub import programs, publish
from .run.policies import Chosen, choose, taken

# Largest difference from the eager policy, relative to each dimension's range. bfloat16 has 8 bits, of which the
# layers' and a sampler's steps lose some more.
TOLERANCE = {"pt2": 1e-5, "onnx": 1e-4, "bf16": 0.05}
UNITS = "the robot's units, as in the data"


@dataclass(kw_only=True)
class Args:
    """Export the policy of a run as a program of torch.export, or as ONNX."""

    run: Annotated[str, tyro.conf.Positional, one_word()] = ""
    """Run folder, its policy folder, or that of a checkpoint."""
    which: str = "last"
    """Policy of the run: last, best, or a step that has a checkpoint."""
    plugins: tuple[str, ...] = ()
    """Modules, or Python files, to import first. Name those of the run, too: a run folder may be a stranger's."""
    format: tuple[Literal["pt2", "onnx"], ...] = ("pt2",)
    """pt2 needs torch alone, onnx needs onnxruntime alone."""
    out: str = ""
    """File to write; by default policy.pt2 beside policy.json, and for a checkpoint, in its run's folder."""
    bf16: bool = False
    """Weights and computation in bfloat16; inputs, normaliser and actions stay float32."""
    check: bool = False
    """Measure how long a plan takes, with the file that is there, or a new one."""
    rate: float | None = None
    """Control rate in Hz that the file and --check tell of; by default that of the data, where it is known."""
    policy: Inference = Inference()
    """Inference settings; by default those that it was saved with."""
    to_hub: str = ""
    """Upload the policy to this repository of the Hugging Face hub, USER/NAME, with a model card and what was exported
    before, and export nothing."""
    private: bool = False
    """Make that repository for its owner alone."""
    licence: str = ""
    """Licence of the uploaded policy, as the hub names it, such as mit or apache-2.0."""


class Whole(nn.Module):
    """Observations in the data's units -> action or chunk in the data's units, float32; discrete actions int64.

    Raises:
        UserError: a residual policy, which is two.
    """

    def __init__(self, policy: Policy, bf16: bool = False, precision: torch.dtype = torch.float64) -> None:
        super().__init__()
        if not isinstance(policy, Policy):
            remedy = "the frozen one alone is exported from its folder, such as RUN/policy/base"
            raise UserError(
                f"a residual policy corrects another one at each step, so it is no single program; {remedy}"
            )
        module = copy.deepcopy(policy.module).requires_grad_(False)  # so that actions are plain numbers to who calls it
        self.module = in_bfloat16(module) if bf16 else module
        self.takes_tensor, self.form, self.precision = policy.takes_tensor, policy.form, precision
        self.normaliser = policy.normaliser.to(torch.device("cpu"))
        task = policy.settings.task  # then the program is for this one, which may be a new wording
        self.told = self.normaliser.described([task]) if task is not None else {}

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        batch = self.normaliser(observation)
        rows = next(iter(observation.values())).shape[0]
        batch |= {key: value.expand(rows, *value.shape[1:]) for key, value in self.told.items()}
        action = self.module(batch["observation.state"] if self.takes_tensor else batch)
        action = self.normaliser.undo("action", action.float() if action.is_floating_point() else action)
        return self.form.to_robot(action, observation, self.precision)


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
    if tasks_of(policy):
        batch["task_index"] = torch.arange(rows) % len(policy.spec["task"]["values"])
    if hasattr(policy.module, "noise_shape"):
        noise_shape: Any = policy.module.noise_shape
        batch["noise"] = torch.randn(rows, *noise_shape, generator=generator)
    return batch


# ---- what a file says of itself ------------------------------------------------------------------------------------


def description(policy: Policy, rate: float | None = None, bf16: bool = False) -> dict[str, Any]:
    """Metadata of the file: inputs and output without the batch dimension, rates, inference settings, versions."""
    inputs = {
        key: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")} | meant(policy, key)
        for key, value in example(policy, 1).items()
    }
    shape = [policy.chunk] * policy.chunked + list(policy.action_shape)
    kind = "int64" if "classes" in policy.spec["action"] else "float32"
    found = {
        "inputs": inputs,
        "action": shape,
        "outputs": {"action": {"shape": shape, "dtype": kind} | meant(policy, "action")},
        "rates": {"control_hz": rate or rate_of(policy), "action_steps": policy.action_steps},
        "inference": policy.inference,
        "precision": "bfloat16" if bf16 else "float32",
        "versions": {"torch": torch.__version__, "tendon": provenance.environment(())["git_commit"]},
    }
    return found | ({"tasks": tasks} if (tasks := tasks_of(policy)) else {})


def tasks_of(policy: Policy) -> list[str]:
    """The texts among which the input `task_index` chooses; none where the data or `--policy.task` leaves no choice."""
    return policy.spec["task"]["values"] if "task" in policy.spec and policy.settings.task is None else []


def meant(policy: Policy, key: str) -> dict[str, Any]:
    """What the numbers of an input or of the action mean: units and, where they are known, names and ranges."""
    if key == "noise":
        return {"units": "drawn anew for each plan from a standard normal distribution"}
    if key == "task_index":
        return {"units": "place of the text in tasks"}
    feature = policy.spec[key]
    if is_picture(key, feature["dtype"]):
        resized = "; scaled by one factor to this size, centred, black around" if "resized_from" in feature else ""
        return {"units": f"pixels 0 to 255, channels first{resized}"}
    if "classes" in feature:
        return {"units": "number of the chosen action", "range": [0, feature["classes"] - 1]}
    stats = feature.get("bounds") or feature.get("stats") or {}
    if key == "action" and policy.form.changes:  # how it is learnt is not how it is executed
        stats = policy.form.stats
    found: dict[str, Any] = {"units": UNITS}
    if (steps := feature.get("steps", 1)) > 1:
        found["units"] += f"; {steps} steps in a row, the newest last"
    if "names" in feature:
        found["names"] = feature["names"]
    return found | ({"range": [stats["min"], stats["max"]]} if {"min", "max"} <= set(stats) else {})


def told(description: dict[str, Any]) -> list[str]:
    """The lines that tell a user what a file says of itself, without names and ranges."""
    lines = []
    for way in ("inputs", "outputs"):
        for key, of in description[way].items():
            shape = ", ".join(map(str, ["B", *of["shape"]]))
            lines.append(f"  {way[:-1]} {key}: {of['dtype']} [{shape}], {of['units']}")
    rest = ("rates", "inference", "precision", "tasks", "versions")
    return lines + [f"  {key}: {json.dumps(description[key])}" for key in rest if key in description]


def rate_of(policy: Policy) -> float | None:
    """Steps a second of the data that it learnt from, where they are known."""
    return policy.spec["action"].get("fps")


# ---- writing -------------------------------------------------------------------------------------------------------


def export(policy: Policy, path: Path, bf16: bool = False, rate: float | None = None) -> float:
    """Write the policy in the format of `path`, and return by how much what is read from there differs from it.

    Raises:
        UserError: a policy that cannot be exported, or whose exported actions differ; nothing is written then.
    """
    write, read = FORMATS[path.suffix[1:]]
    precision = torch.float32 if path.suffix == ".onnx" else torch.float64  # onnxruntime lacks some in float64
    program = traced(Whole(policy, bf16, precision).eval().cpu(), example(policy, 2))
    temporary = path.with_name(f".{path.name}")
    try:
        write(program, temporary, description(policy, rate, bf16))
        kind = "bf16" if bf16 else path.suffix[1:]
        if not (largest := difference(policy, read(temporary)[0])) <= TOLERANCE[kind]:
            raise UserError(f"the exported policy's actions differ by {largest:.2g} of their range; nothing is written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return largest


@torch.no_grad()
def difference(policy: Policy, program: Program) -> float:
    """Largest difference of a program's actions from the policy's, for one row and for several.

    It is relative to the range of each dimension in the data, so that a gripper from 0 to 1 counts as much as a
    position in millimetres; to 1 where that is unknown. A hundredth of the action is the least, for float32.
    """
    whole, found = Whole(policy).eval().cpu(), []
    action = policy.spec["action"]
    stats = {"min": 0.0, "max": 1.0} | ({} if "classes" in action else robot_stats(action))
    spread = torch.as_tensor(stats["max"]).double() - torch.as_tensor(stats["min"]).double()
    for rows in (1, 3):
        batch = example(policy, rows)
        eager = whole(batch)
        apart = (eager.double() - policy.form.nearest(program(batch), eager).double()).abs()
        size = torch.maximum(spread, eager.double().abs() / 100).clamp(min=1e-12)
        found.append((apart / size).max())
    return float(torch.stack(found).max())  # NaN where one of them is


def recognised(policy: Policy, path: Path, bf16: bool) -> float:
    """Difference of a file that is there from the policy.

    Raises:
        UserError: it holds another policy, or none.
    """
    try:
        program, found = FORMATS[path.suffix[1:]][1](path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: damaged, or no exported policy; remove it, and it is written anew") from error
    wanted = json.loads(json.dumps(description(policy)))
    same = all(found.get(key) == wanted[key] for key in ("inputs", "outputs", "inference"))
    kind = "bf16" if bf16 else path.suffix[1:]
    if not same or not (largest := difference(policy, program)) <= TOLERANCE[kind]:
        raise UserError(f"{path} holds another policy, or other inference settings; remove it, or export it anew")
    return largest


# ---- latency -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(policy: Policy, paths: list[Path], rate: float | None) -> list[str]:
    """Lines that tell how long a plan from one observation takes, by the policy and by each file."""
    batch = example(policy, 1)
    calls: dict[str, Callable[[], object]] = {"policy": eager_call(policy, batch)}
    for path in paths:
        program, _ = FORMATS[path.suffix[1:]][1](path)
        calls[path.name] = partial(program, batch)
    found = latency.measure(calls)
    calls_each, threads = found["policy"].calls, torch.get_num_threads()
    lines = [f"one observation to a plan, {calls_each} calls each in turn, cpu, {threads} thread{'s' * (threads > 1)}:"]
    for name, one in found.items():
        ratio = f"{found['policy'].median / one.median:.2f}x as fast as the policy" if name != "policy" else "eager"
        lines.append(f"  {name:<16} median {one.median:.3g} ms, 95 % within {one.p95:.3g} ms, {ratio}")
    fastest = min(found, key=lambda name: found[name].p95)
    meaning = latency.meaning(found[fastest], rate or rate_of(policy), policy.action_steps)
    return [*lines, f"by the {fastest}:", *(f"  {line}" for line in meaning.splitlines())]


def eager_call(policy: Policy, batch: dict[str, Tensor]) -> Callable[[], object]:
    """What acts on the newest observation of a batch, as the first of an episode: it plans each time."""
    now = (0, -1) if policy.obs_steps > 1 else (0,)
    observation: dict[str, Any] = {  # the newest of a flattened history is at its end
        key: batch[key][now][..., -policy.frames[key][-1] :].numpy() for key in policy.observation_keys
    }
    if "task" in policy.spec:
        observation["task"] = policy.spec["task"]["values"][0]

    def act() -> object:
        policy.reset()
        return policy.act(observation)

    return act


# ---- command -------------------------------------------------------------------------------------------------------


def destination(run: Path, chosen: Chosen, args: Args, kind: str) -> Path:
    """The file to write; a checkpoint's folder holds what its manifest says, and nothing else.

    Raises:
        UserError: `--out` is in no folder, in a checkpoint's, or of another format.
    """
    ending = ".bf16.pt2" if args.bf16 else f".{kind}"
    beside = chosen.folder / f"policy{ending}"
    if (chosen.folder / "manifest.json").exists():
        beside = run_of(run) / f"policy-step-{chosen.step:09d}{ending}"
    path = Path(args.out) if args.out else beside
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no such folder {path.parent}")
    if (path.parent / "manifest.json").exists():
        raise UserError(f"--out {path}: a further file would damage this checkpoint; name one in another folder")
    if path.suffix != f".{kind}":
        raise UserError(f"--out {path}: with --format {kind} its name must end in .{kind}")
    return path


def check_args(args: Args) -> None:
    """Refuse options that do not go together. Raises UserError."""
    if not args.format:
        raise UserError("--format: name one or both of pt2 and onnx")
    if (args.private or args.licence) and not args.to_hub:
        raise UserError("--private and --licence are for --to-hub USER/NAME")
    if args.to_hub and (args.out or args.check or args.bf16 or args.rate or args.format != Args.format):
        raise UserError(f"--to-hub {args.to_hub} uploads what was exported before; export first, without it")
    if args.out and len(set(args.format)) > 1:
        raise UserError(f"--out {args.out} is one file; --format {' '.join(args.format)} writes several")
    if args.bf16 and "onnx" in args.format:
        raise UserError("--bf16 with --format onnx: onnxruntime has no bfloat16 for most operations; take --format pt2")
    if args.rate is not None and not 0 < args.rate < float("inf"):
        raise UserError(f"--rate {args.rate} must be above 0")


def main(argv: list[str]) -> int:
    """Load, export, compare and time the policy; returns the exit code. Raises UserError."""
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
    check_args(args)
    policy.configure(**vars(args.policy))
    paths = [destination(Path(args.run), chosen, args, kind) for kind in dict.fromkeys(args.format)]
    print(f"{args.run}: {chosen}")
    if args.to_hub:
        run = run_of(Path(args.run))
        for path in programs(run, chosen):
            recognised(policy, path, ".bf16." in path.name)
        print(publish(run, chosen, policy.settings, args.to_hub, args.private, args.licence))
        return 0
    for path in paths:
        there = args.check and path.exists()
        largest = recognised(policy, path, args.bf16) if there else export(policy, path, args.bf16, args.rate)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to the policy to {largest:.1g}")
    if "method" in policy.inference:
        print("delay, real-time and blocking are recorded, but not done by the file, which only plans chunks")
    if args.check:
        print("\n".join(check(policy, paths, args.rate)))
        return 0
    print("\n".join(told(description(policy, args.rate, args.bf16))))
    return 0


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
