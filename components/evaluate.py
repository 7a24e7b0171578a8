"""Evaluate a finished run again.

python -m components.evaluate runs/x --eval-episodes 200
python -m components.evaluate runs/x --env.max-episode-steps 500 --video
python -m components.evaluate runs/x --policy.action-steps 4 --policy.sampling-steps 20
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import ENV_BUILDER_REGISTRY, load_policy
from .acting.evaluation import Evaluator, headline
from .acting.policy import Inference
from .acting.policy_folder import recorded_options, saved_settings
from .contracts import instantiate, options_of
from .envs.vector import Environments
from .errors import UserError, one_line
from .run import logs, process
from .run import record as run_record
from .run.arguments import Rule, check_bounds
from .run.command_line import check_reach, import_for, parse, parse_names, pick


@dataclass(kw_only=True)
class Names:
    """Options that the first pass reads."""

    run: Annotated[str, tyro.conf.Positional] = ""
    env: str = ""
    plugins: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Args(Names):
    """Evaluate the policy of a run and append a line to its eval.jsonl."""

    run: Annotated[str, tyro.conf.Positional] = ""
    """Run folder."""
    env: str = ""
    """Environment; by default that of the run."""
    plugins: tuple[str, ...] = ()
    """Modules to import first; those of the run must be named again, since a run folder may be a stranger's."""
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
    """Record a video of the first three episodes in the run's videos/."""
    env_options: Annotated[Any, tyro.conf.arg(name="env")]


def main(argv: list[str]) -> int:
    """Load the policy, run the episodes, append a line; returns the exit code. Raises UserError and RuntimeError."""
    run_record.start_logging(rank=0)
    names = parse_names(Names, [word for word in argv if word not in ("-h", "--help")])
    if not names.run:
        parse(Args, argv, Args(env_options=options_of(object)))
        raise UserError("which run? python -m components.evaluate RUN [--eval-episodes N]")
    run = Path(names.run)
    record = run_record.read_args(run)
    import_for(run, record["args"]["plugins"], names.plugins)
    known = record["env"] or {"name": "none"}
    name = names.env or known["name"]
    if name == "none":
        raise UserError(f"{run} has no environment; name one with --env")
    options = {key: value for key, value in known.items() if key != "name"} if name == known["name"] else {}
    component = pick(ENV_BUILDER_REGISTRY, "env", name)
    recorded = recorded_options(component, options, f"{run / 'args.json'}: env")
    args = parse(Args, argv, Args(run=str(run), env=name, env_options=recorded, policy=saved_settings(run)))
    check_bounds(args)
    check_reach(run, "env", args.env_options, argv, names.plugins)
    policy = load_policy(run, **vars(args.policy))
    with one_line(f"env {name!r}"):
        make = instantiate(component, args.env_options).build
        envs = Environments(make, min(args.eval_envs, args.eval_episodes), args.eval_seed, args.env_timeout)
        seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
        env = {"name": name, **asdict(args.env_options)}
        evaluator = Evaluator(policy, envs, env, seeds, options=args.env_options)
    step = run_record.read_status(run)["step"]
    result, problem = evaluator.evaluate(step)
    if result is None:
        raise RuntimeError(f"the evaluation failed: {problem}")
    logs.append_line(run / "eval.jsonl", result | {logs.LATER: "components.evaluate"})
    print(f"step {step}: {headline(result)}")
    if args.video:
        film = run / "videos" / f"step-{step:09d}-seed-{args.eval_seed}.mp4"
        print(evaluator.film(film) or f"film: {film}")
    envs.close()
    return 0


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
