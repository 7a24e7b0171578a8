"""One job of two processes that makes the runs of `test_launched.py`: python on_two_processes.py FOLDER."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import offline_trainer  # noqa: E402
import online_trainer  # noqa: E402
import toy  # noqa: E402
from components import TRAINER_REGISTRY, parallel  # noqa: E402
from components.run import process  # noqa: E402
from components.run import record as run_record  # noqa: E402

# The group of processes lives on from run to run: torch cannot make a second one from the same rendezvous.
offline_trainer.Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
run_record.draw_curves = lambda runs, path: None  # as in conftest.py: drawing takes longer than these trainings
FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])


def run(name: str, *options: object, resume: bool = False, script: Any = offline_trainer) -> str:
    """Run the script on both processes; returns what it raised."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    data = ("--dataset", "toy") if script is offline_trainer else ("--num-envs", 4)
    data += ("--env", "savable") * (script is online_trainer and "--env" not in options)
    where = ("--resume", FOLDER / name) if resume else ("--run-dir", FOLDER / name, *data)
    small = () if resume else ("--eval-episodes", 0) + ("--batch-size", 16) * ("--batch-size" not in options)
    try:
        script.main([str(word) for word in (*where, *small, *options)])
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        (FOLDER / f"{name}-error-{RANK}.txt").write_text(problem)
        return problem
    return ""


class OneRank(toy.Minimal):
    """What one process does and another does not: a metric, a gradient, a parameter that none of them uses."""

    def __init__(self, models: Any, optimizers: Any, loss: Any, device: Any) -> None:
        super().__init__(models, optimizers, loss, device)
        policy = models["policy"]
        policy.unused = torch.nn.Parameter(torch.ones(3, 3))
        policy.sometimes = torch.nn.Parameter(torch.ones(3, 3))
        optimizers["policy"].add_param_group({"params": [policy.unused, policy.sometimes], "weight_decay": 0.5})
        group = optimizers["policy"].param_groups[0]
        extra = optimizers["policy"].param_groups[-1]
        extra.update({key: value for key, value in group.items() if key not in extra})

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        loss = self.loss(self.models["policy"](data), data["action"])
        if RANK == 1:
            loss = loss + self.models["policy"].sometimes.sum()
        self.optimizers["policy"].zero_grad()
        loss.backward()
        self.optimizers["policy"].step()
        return {"rank": float(RANK), "loss": loss} | ({"only_on_one": 3.0} if RANK == 1 else {})


class Closure(toy.Minimal):
    """Steps with a closure, whose gradient no hook would see."""

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        def closure() -> Any:
            self.optimizers["policy"].zero_grad()
            loss = self.loss(self.models["policy"](data), data["action"])
            loss.backward()
            return loss

        return {"loss": self.optimizers["policy"].step(closure)}


TRAINER_REGISTRY |= {"one_rank": OneRank, "closure": Closure}


def dying(calls: int, action: Callable[[], str]) -> None:
    """Both processes stop in the middle, as if they were killed."""
    whole, count = TRAINER_REGISTRY["bc"].train_step, iter(range(10**9))

    def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
        if next(count) == calls:
            raise RuntimeError("killed")
        return whole(self, data)

    TRAINER_REGISTRY["bc"].train_step = train_step
    action()
    TRAINER_REGISTRY["bc"].train_step = whole


def crashing_on_rank_1(action: Callable[[], str]) -> None:
    """The environment fails on one process only."""
    whole = toy.ToyEnv.step

    def step(self: Any, action: Any) -> Any:
        if RANK == 1:
            raise ArithmeticError("simulator exploded")
        return whole(self, action)

    toy.ToyEnv.step = step
    action()
    toy.ToyEnv.step = whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_randn = torch.randn
    own = {name: getattr(torch, name) for name in toy.sliced_noise(RANK, 2)}
    for trainer, options in toy.TRAINERS.items():
        for name, draw in toy.sliced_noise(RANK, 2).items():
            setattr(torch, name, draw)
        run(trainer, *options, *toy.SGD, "--optimizer.lr", 0.01)
    for name, draw in own.items():
        setattr(torch, name, draw)
    if RANK == 0:
        (FOLDER / "world.json").write_text(json.dumps(parallel.world_size()))
    run("experts", *toy.EXPERTS, *toy.SGD)
    run("clipped", "--trainer", "bc", "--loss", "l1", *toy.SGD, "--grad-clip", 0.3)
    run("accumulated", "--trainer", "bc", *toy.SGD, "--grad-accumulation", 2)
    run("actor_critic", "--trainer", "actor_critic")
    run("pictures", *toy.PICTURES, *toy.SGD[:-1], 10)
    run("minimal", "--trainer", "minimal", "--dataset", "minimal_data", "--steps", 20)
    run("with_keywords", "--trainer", "with_keywords", "--dataset", "minimal_data", "--steps", 20)
    run("evaluated", "--trainer", "bc", *toy.SGD, "--eval-episodes", 7, "--eval-envs", 2)
    learning = ("--steps", 80, "--learning-starts", 20, *toy.SAC)
    run("online", *learning, "--eval-episodes", 3, "--save-every", 40, script=online_trainer)
    more = ("--steps", 80, "--trainer.share", 0.5, "--env.mode", "SameStep")
    run("dagger", *toy.ONLINE_ALONE["dagger"], *more, "--learning-starts", 20, script=online_trainer)
    fault = ("--env", "faulty", "--env.rank", 1, "--env.at", 17, "--steps", 120, "--log-every", 20)
    statistics = ("--normalise-observations", "--normalise-rewards")
    run("ppo_fault", *toy.ONLINE_ALONE["ppo"], *fault, "--eval-episodes", 2, "--save-every", 40, script=online_trainer)
    run("sac_fault", *toy.SAC, *fault, *statistics, "--learning-starts", 20, script=online_trainer)
    run("steered", *toy.FLOW_OF_AN_MLP, "--steps", 5)
    steers = (*toy.DSRL, "--trainer.base", FOLDER / "steered", "--steps", 40, "--learning-starts", 20)
    run("dsrl", *steers, "--eval-episodes", 2, script=online_trainer)
    torch.randn = toy.sliced_randn(RANK, 2)
    run("ppo", *toy.WHOLE_ROLLOUTS, script=online_trainer)
    torch.randn = own_randn
    resumable = ("--trainer", "bc", "--steps", 30, "--save-every", 10, "--log-every", 7, "--model.dropout", 0.3)
    run("whole", *resumable)
    dying(15, lambda: run("resumed", *resumable))
    run("resumed", resume=True)
    crashing_on_rank_1(lambda: run("crashed", "--trainer", "bc", "--steps", 20, "--eval-episodes", 4))
    run("one_rank", "--trainer", "one_rank", "--optimizer.weight-decay", 0.5, "--steps", 5)
    run("skipped", "--trainer", "actor_critic", "--trainer.skip-on-rank", 1)
    run("bad_on_one", "--trainer", "bc", "--loss", "bad", "--loss.rank", 1, "--steps", 60)
    run("closure", "--trainer", "closure", "--optimizer", "sgd", "--steps", 2)
    run("bad_data", "--trainer", "bc", "--dataset.nan")
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[RANK]
    moments = [float(x) for x in (*parallel.global_moments(values), parallel.global_mean(values))]
    (FOLDER / f"moments-{RANK}.json").write_text(json.dumps(moments))
    # As the scripts end: an interpreter that is taken down beside gloo's threads may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    process.leave(0)
