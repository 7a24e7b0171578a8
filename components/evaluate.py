"""Evaluate a policy of a run again, also of one that goes on or was stopped.

python -m components.evaluate runs/x --eval-episodes 200
python -m components.evaluate runs/x --which best                 # or a step; so does runs/x/checkpoints/best
python -m components.evaluate runs/x --env.max-episode-steps 500 --video
python -m components.evaluate runs/x --policy.action-steps 4 --policy.sampling-steps 20
python -m components.evaluate runs/x --recordings                                       # the episodes it held out
python -m components.evaluate runs/x --dataset lerobot --dataset.path demos/new         # all of other recordings
"""

import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import DATASET_BUILDER_REGISTRY, ENV_BUILDER_REGISTRY
from .acting.evaluation import Evaluator, headline
from .acting.inference import Inference
from .acting.policy_folder import recorded_options
from .acting.recordings import Recordings, evenly
from .contracts import instantiate, options_of
from .datasets.recorded import to_compare
from .envs.vector import Environments
from .errors import UserError, one_line
from .run import logs, process
from .run import record as run_record
from .run.arguments import Rule, check_bounds
from .run.checkpoint import run_of
from .run.command_line import asks_for_help, check_reach, import_for, one_word, parse, parse_names, pick
from .run.policies import taken
from .run.progress import EVALUATING, showing
from .run.reading import read_args, read_status

CHOSEN = {"env": ENV_BUILDER_REGISTRY, "dataset": DATASET_BUILDER_REGISTRY}
USAGE = "RUN [OPTIONS]"


@dataclass(kw_only=True)
class Args:
    """Evaluate the policy of a run and append a line to its eval.jsonl."""

    run: Annotated[str, tyro.conf.Positional, one_word()] = ""
    """Run folder, or that of a checkpoint."""
    which: str = "last"
    """Policy of the run: last, best, or a step that has a checkpoint."""
    env: str = ""
    """Environment; by default that of the run."""
    recordings: bool = False
    """Compare with recorded actions, of the episodes that the run held out; --video draws three of them. The default
    where no environment is known."""
    dataset: str = ""
    """Format of other recordings to compare with, all of them; by default the run's."""
    plugins: tuple[str, ...] = ()
    """Modules, or Python files, to import first. Name those of the run, too: a run folder may be a stranger's."""
    eval_episodes: Annotated[int, Rule(1)] = 50
    """Number of episodes."""
    eval_envs: Annotated[int, Rule(1)] = 10
    """Environments that are stepped together."""
    eval_seed: Annotated[int, Rule(0)] = 1_000_000
    """Seed of the first episode; the others follow."""
    env_timeout: Annotated[float, Rule(0)] = 60.0
    """Seconds that a step of the environments may take; 0 for no limit."""
    policy: Inference = Inference()
    """Inference settings; by default those of its run."""
    video: bool = False
    """Film the first four episodes, in the run's videos/."""
    env_options: Annotated[Any, tyro.conf.arg(name="env")] = field(default_factory=partial(options_of, object))
    dataset_options: Annotated[Any, tyro.conf.arg(name="dataset")] = field(default_factory=partial(options_of, object))


def main(argv: list[str]) -> int:
    """Load the policy, run the episodes, append a line; returns the exit code. Raises UserError and RuntimeError."""
    run_record.start_logging(rank=0)
    names = parse_names(Args, argv)
    if not names.run:
        if asks_for_help(argv):
            parse(Args, argv, registries=CHOSEN, usage=USAGE)
        raise UserError("which run? It comes first: python -m components.evaluate RUN [OPTIONS]")
    run = run_of(Path(names.run))
    record = read_args(run)
    import_for(run, record["args"]["plugins"], names.plugins)
    if wants_recordings(names, record, argv):
        return against_recordings(run, record, names, argv)
    known = record["env"] or {"name": "none"}
    name = names.env or known["name"]
    if name == "none":
        raise UserError(f"{run} has no environment; name one with --env")
    options = {key: value for key, value in known.items() if key != "name"} if name == known["name"] else {}
    component = pick(ENV_BUILDER_REGISTRY, "env", name)
    policy, chosen = taken(names.run, names.which)
    recorded = recorded_options(component, options, f"{run / 'args.json'}: env")
    default = Args(run=str(run), env=name, env_options=recorded, policy=policy.settings)
    args = parse(Args, argv, default, registries=CHOSEN, usage=USAGE)
    check_bounds(args)
    check_reach(run, "env", args.env_options, argv, names.plugins)
    policy.configure(**vars(args.policy))
    print(f"{run}: {chosen}")
    with one_line(f"env {name!r}"):
        make = instantiate(component, args.env_options).build
        envs = Environments(make, min(args.eval_envs, args.eval_episodes), args.eval_seed, args.env_timeout)
        seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
        env = {"name": name, **asdict(args.env_options)}
        evaluator = Evaluator(policy, envs, env, seeds, options=args.env_options)
    step = step_of(run, chosen)
    film = run / "videos" / f"step-{step:09d}-seed-{args.eval_seed}.mp4"
    conclude(run, step, evaluator, film if args.video else None)
    envs.close()
    return 0


def step_of(run: Path, chosen: Any) -> int:
    """The step of a policy that was `taken`; that of the run for its last one."""
    return read_status(run)["step"] if chosen.step is None else chosen.step


def conclude(run: Path, step: int, evaluator: Any, film: Path | None) -> None:
    """Evaluate, append the line, print it, and write a `film`, if any. Raises RuntimeError: the evaluation failed."""
    with showing() as progress, progress.phase(EVALUATING, unit="episodes"):
        evaluator.seen = progress.done
        result, problem = evaluator.evaluate(step)
    if result is None:
        raise RuntimeError(f"the evaluation failed: {problem}")
    logs.append_line(run / "eval.jsonl", result | {logs.LATER: "components.evaluate"})
    print(f"step {step}: {headline(result)}")
    if film:
        print(evaluator.film(film) or f"{'film' if film.suffix == '.mp4' else 'picture'}: {film}")


# ---- against recordings --------------------------------------------------------------------------------------------


def wants_recordings(names: Args, record: dict[str, Any], argv: list[str]) -> bool:
    """Whether to compare with recorded actions. Raises UserError: the command line asks for an environment, too."""
    asked = names.recordings or asks_for("dataset", argv)
    if (env := asks_for("env", argv)) and asked:
        raise UserError("--env evaluates in an environment, --recordings and --dataset without one; leave one out")
    return asked or not (env or record["env"] or record["args"]["dataset"] == "none")


def asks_for(option: str, argv: list[str]) -> bool:
    """Whether the command line sets an option or one of its group."""
    return any(word.partition("=")[0] == f"--{option}" or word.startswith(f"--{option}.") for word in argv)


def against_recordings(run: Path, record: dict[str, Any], names: Args, argv: list[str]) -> int:
    """Compare with the episodes that the run held out, or with all of other recordings; returns the exit code."""
    config = record["args"]
    name, place = names.dataset or config["dataset"], f"{run / 'args.json'}: dataset"
    if name == "none":
        raise UserError(f"{run} has not learnt from recordings; name some with --dataset")
    component = pick(DATASET_BUILDER_REGISTRY, "dataset", name)
    known = recorded_options(component, config["dataset_options"] if name == config["dataset"] else {}, place)
    if asks_for("dataset.path", argv) or asks_for("dataset.repo-id", argv):  # one of them is enough
        known = replace(known, **{key: "" for key in ("path", "repo_id") if hasattr(known, key)})
    default = Args(run=str(run), recordings=True, dataset=name, dataset_options=known)
    policy, which = taken(names.run, names.which)
    args = parse(Args, argv, replace(default, policy=policy.settings), registries=CHOSEN, usage=USAGE)
    check_bounds(args)
    check_reach(run, "dataset", args.dataset_options, argv, names.plugins)
    policy.configure(**vars(args.policy))
    print(f"{run}: {which}")
    with one_line(f"dataset {name!r}"):
        factory, options = instantiate(component, args.dataset_options), args.dataset_options
        found, data = to_compare(run, factory, options, asks_for("dataset", argv))
        chosen = evenly(found, args.eval_episodes)
        evaluator = Recordings(policy, chosen, args.eval_seed, args.eval_envs, data=data)
    step = step_of(run, which)
    subject = re.sub(r"[^\w.-]+", "-", Path(evaluator.record["data"]).name)[:80]
    film = run / "videos" / f"step-{step:09d}-{subject}.png"
    conclude(run, step, evaluator, film if args.video else None)
    return 0


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
