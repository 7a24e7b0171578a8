"""Texts of tasks: stable n-grams, new wordings, what the environment says, mixtures, and runs of older versions."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import toy
from components import ENV_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, REGISTRIES, UserError, load_policy
from components.acting.evaluation import run_episodes
from components.acting.inference import Inference
from components.acting.policy import Policy
from components.acting.recordings import Recordings
from components.data.batches import Batches
from components.data.features import describe_data
from components.data.normalisation import Normaliser
from components.datasets.episodes import EpisodeDataset, from_columns
from components.datasets.mixture import MixtureDataset, give_texts
from components.datasets.recorded import recordings
from components.envs.metaworld import INSTRUCTIONS
from components.envs.observations import task_of
from components.envs.workers import spread
from components.models.encoder import FEATURES, EncodedPolicy, TaskTable
from components.models.language import TaskTexts, ngrams
from components.run.reading import renewed
from conftest import everything, states, weights

Script = Callable[..., Path]
FOUR = ["push-v3", "pick-place-v3", "reach-v3", "drawer-open-v3"]
STATE = {"observation.state": np.zeros(toy.STATE, np.float32)}


# ---- n-grams -------------------------------------------------------------------------------------------------------


def test_a_text_is_the_same_numbers_on_every_machine() -> None:
    """Saved weights belong to these places, so they may never change."""
    assert ngrams("Open  it") == ngrams("open it") == ngrams("ｏｐｅｎ it")
    parts = ["<op", "ope", "pen", "en>", "<ope", "open", "pen>", "<open", "open>", "<it", "it>", "<it>"]
    assert list(ngrams("open it")) == ["word open", "word it", "pair open it", *(f"part {part}" for part in parts)]
    texts = TaskTexts(["open it", "close it"], 3)
    places = texts.table[0].nonzero().flatten()
    assert places.tolist() == [90, 96, 111, 132, 364, 419, 421, 426, 538, 567, 725, 755, 855, 958]
    many, few = 0.271715, 0.100282  # of one text, and of both
    values = [-many, -few, -many, few, few, many, few, many, -many, 2 * many, -many, many, many, many]
    assert texts.table[0, places].tolist() == pytest.approx(values, abs=1e-6)
    assert texts.table.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert not texts.state_dict().keys() - {"layer.weight", "layer.bias"}  # the rest follows from the texts


@pytest.mark.parametrize(
    ("wording", "task"),
    [
        ("Push the puck to the target!", "push-v3"),
        ("shove the puck to the goal", "push-v3"),
        ("lift up the puck and place it there", "pick-place-v3"),
        ("reach for it with your hand", "reach-v3"),
        ("pull the drawer open", "drawer-open-v3"),
        *((name, name) for name in FOUR),  # Meta-World's names
    ],
)
def test_a_new_wording_is_nearest_to_its_task(wording: str, task: str) -> None:
    texts = TaskTexts([INSTRUCTIONS[name] for name in FOUR], 3)
    likeness = texts.table @ texts.vectors([wording])[0]
    first, second = likeness.topk(2).values
    assert FOUR[int(likeness.argmax())] == task and first > 1.5 * second


def test_what_no_learnt_text_has_counts_for_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a wording is reported once; texts that differ in case and spaces alone are the learnt ones."""
    texts = TaskTexts(["open the drawer", "close the window"], 3)
    with caplog.at_level(logging.WARNING):
        plain, more = texts.vectors(["the drawer", "the drawer xyz"])
        assert torch.equal(plain, more) and len(caplog.records) == 2
        assert "'the drawer' is a new wording; nearest of the 2 learnt ones: 'open the drawer'" in caplog.messages[0]
        assert torch.equal(texts.vectors(["the drawer", "Open the  DRAWER"])[1], texts.table[0])
        assert len(caplog.records) == 2
    for unknown in ("xyz", "", "  "):
        with pytest.raises(UserError, match="it shares no part of a word with any of the 2 that the policy has learnt"):
            texts.vectors([unknown])
    blank = TaskTexts(["", "open the drawer"], 3)  # a learnt text may be empty, beside a new wording
    assert blank.vectors(["", "opening it"]).norm(dim=1).tolist() == pytest.approx([0, 1])
    monkeypatch.setattr("components.models.language.KEPT", 8)
    for number in range(10):  # of which not all are kept
        texts._vector(f"open {number}")
    assert len(texts._vectors) == 8
    TaskTexts(["Open", "open"], 3)
    assert "the tasks 'Open' and 'open' read alike; --model.encoder.language table" in caplog.messages[-1]
    signs = TaskTexts(["←", "→", "打开抽屉", "关上抽屉"], 3)
    assert len(signs.table.unique(dim=0)) == 4


def test_many_texts_are_embedded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, index = TaskTexts(["one", "two", "three"], 3), torch.tensor([2, 0, 2, 1])
    nn.init.normal_(texts.layer.weight)
    all_at_once = texts({"task_index": index})
    monkeypatch.setattr("components.models.language.FEW", 2)
    assert torch.allclose(texts({"task_index": index}), all_at_once, atol=1e-6)


# ---- a policy ------------------------------------------------------------------------------------------------------

OPEN, CLOSE = "open the drawer", "close the window"
SPEC = {
    "observation.state": {"shape": (2,), "dtype": "float32"},
    "action": {"shape": (3,), "dtype": "float32"},
    "task": {"shape": (), "dtype": "text", "values": [OPEN, CLOSE]},
}


class Says(nn.Module):
    """The action is the task's embedding."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return batch[FEATURES]


def policy_of(language: str = "ngrams", **settings: Any) -> Policy:
    torch.manual_seed(0)
    encoder = MODEL_BUILDER_REGISTRY["cnn"](task_features=3, language=language).build(SPEC)
    if language == "ngrams":
        nn.init.normal_(encoder.task.layer.weight)
    return Policy(EncodedPolicy(encoder, Says()), Normaliser(SPEC), SPEC, Inference(**settings))


def act(policy: Policy, task: str | list[str] | None = None) -> np.ndarray:
    policy.reset()
    state = np.zeros((len(task), 2) if isinstance(task, list) else 2, np.float32)
    return policy.act({"observation.state": state} | ({} if task is None else {"task": task}))


def test_one_policy_acts_by_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """Each row by its own, known or new; a new wording acts more like its task than like the other."""
    policy, wording = policy_of(), "Please open that drawer"
    known = act(policy, OPEN), act(policy, CLOSE)
    assert np.abs(known[0] - known[1]).max() > 0.1
    both = act(policy, [CLOSE, wording, OPEN])
    assert np.allclose(both[[2, 0]], known, atol=1e-6) and np.allclose(both[1], act(policy, wording), atol=1e-6)
    assert np.linalg.norm(both[1] - known[0]) < np.linalg.norm(both[1] - known[1])
    assert [message for message in caplog.messages if "new wording" in message] == [caplog.messages[0]]
    with pytest.raises(UserError, match="unknown task 'xyz': it shares no part of a word"):
        act(policy, [OPEN, "xyz"])
    with pytest.raises(UserError, match="'task' has 1 texts; expected one, or one for each of 2 rows"):
        policy.reset()
        policy.act({"observation.state": np.zeros((2, 2), np.float32), "task": [OPEN]})
    table = policy_of("table")
    assert np.abs(act(table, OPEN) - act(table, CLOSE)).max() > 0.1
    with pytest.raises(UserError, match=f"unknown task '{wording}'; nearest: {OPEN}"):
        act(table, wording)


def test_the_text_of_a_command_line() -> None:
    policy = policy_of(task="pull the drawer open")
    assert policy.inference["task"] == "pull the drawer open"
    assert np.allclose(act(policy), act(policy_of(), "pull the drawer open"))
    columns = {"observation.state": torch.zeros(2, 2), "action": torch.zeros(2, 3)}
    episodes = from_columns(columns | {"task_index": torch.zeros(2).long()}, torch.tensor([2]), "recorded")
    episodes.tasks = ["xyz"]  # the text of the recording is another one
    held_out = recordings(EpisodeDataset(episodes))
    assert np.allclose(Recordings(policy, held_out, 0, 1)._predict([0])[0], act(policy))
    with pytest.raises(UserError, match="recorded: unknown task 'xyz'"):
        Recordings(policy_of(), held_out, 0, 1)
    with pytest.raises(UserError, match="^--policy.task: unknown task 'xyz': it shares no part"):
        policy.configure(task="xyz")
    with pytest.raises(UserError, match="--policy.task 'pull the drawer open': the policy does not know it; nearest"):
        policy_of("table", task="pull the drawer open")


class Told(gym.Env):
    """One step, whose action is recorded."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    seen: ClassVar[list[np.ndarray]] = []

    def __init__(self, text: str | None = None) -> None:
        if text is not None:
            self.task_description = text

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.seen.append(action)
        return np.zeros(2, np.float32), 0.0, True, False, {}


def test_an_environment_says_its_task(caplog: pytest.LogCaptureFixture) -> None:
    """Each slot its own, or the vector environment; what the command line says wins, what is not understood is none."""

    def played(policy: Policy, *texts: str | None, vector: str = "") -> list[np.ndarray]:
        envs: Any = gym.vector.SyncVectorEnv([partial(Told, text) for text in texts])
        if vector:
            envs.task_description = vector
        Told.seen.clear()
        run_episodes(policy, envs, range(len(texts)))
        return list(Told.seen)

    policy = policy_of()
    opened, closed = act(policy, OPEN), act(policy, CLOSE)
    assert np.allclose(played(policy, CLOSE, OPEN), [closed, opened], atol=1e-6)
    assert policy.inference["task"] == [CLOSE, OPEN]
    assert np.allclose(played(policy, None, None, vector=CLOSE), [closed, closed], atol=1e-6)
    assert policy.inference["task"] == CLOSE and not any("no task is named" in m for m in caplog.messages)
    assert np.allclose(played(policy.configure(task=OPEN), CLOSE), [opened], atol=1e-6)
    assert policy.inference["task"] == OPEN
    for text in (None, "xyz"):
        assert np.allclose(played(policy.configure(task=None), text), [opened], atol=1e-6)  # the first, as is said
    assert sum("no task is named" in message for message in caplog.messages) == 1
    assert np.allclose(played(policy_of("table"), CLOSE), act(policy_of("table"), CLOSE))
    for texts, told in ((OPEN, CLOSE, OPEN), [OPEN, CLOSE, OPEN]), ((CLOSE,) * 3, CLOSE), ((OPEN, None, OPEN), None):
        parts = [texts[:2], texts[2:]]  # by worker processes
        make = lambda n, seed: gym.vector.SyncVectorEnv([partial(Told, text) for text in parts[n == 1]])  # noqa: B023, E731
        shared = spread(make, 3, 0, 2)
        assert task_of(shared) == told
        shared.close()


def test_metaworld_names_its_tasks() -> None:
    """All of them, and its demonstrations by the same texts; with workers, too."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) and len(set(INSTRUCTIONS.values())) == 50
    for workers in (0, 1):
        envs = ENV_BUILDER_REGISTRY["metaworld"](task="reach-v3", workers=workers).build(1, 0)
        assert task_of(envs) == INSTRUCTIONS["reach-v3"]
        envs.close()


# ---- mixtures ------------------------------------------------------------------------------------------------------


def test_the_sources_of_a_mixture_are_told_apart() -> None:
    """By the texts that are asked for, dealt to the episodes in turn, or by their instructions where all have one."""
    built = MixtureDataset(("toy,text=open it|pull it open:1", "toy,text=close it:1"), validation=0.1).build()
    batch = everything(built)
    assert batch["task"][:40:10] == ["open it", "pull it open"] * 2 and set(batch["task"][200:]) == {"close it"}
    assert built["dataset"].tasks == ["open it", "pull it open", "close it"]
    assert describe_data(built, "mixture")["task"]["values"] == ["open it", "pull it open", "close it"]
    assert set(everything({"dataset": built["validation"]})["task"]) <= set(built["dataset"].tasks)
    stream = Batches(built["dataset"], 8, 0).stream(0)
    assert set(next(stream)["task"]) <= set(built["dataset"].tasks)

    def sources(**instructions: str) -> dict[str, Any]:
        made = {name: toy.ToyData(episodes=2).build()["dataset"].episodes for name in instructions}
        for name, text in instructions.items():
            made[name].instruction = text
        return made

    for other, told in (("pull", True), ("push", False), ("", False)):
        found = sources(a="push", b=other)
        give_texts(found, {})
        assert [data.tasks for data in found.values()] == ([["push"], ["pull"]] if told else [(), ()])
        assert all(("task_index" in data.columns) == told for data in found.values())
    for text in ("", "a||b"):
        with pytest.raises(UserError, match="expected text=WORDING or text=WORDING"):
            MixtureDataset((f"toy,text={text}:1",)).build()


# ---- records of runs -----------------------------------------------------------------------------------------------

TWO = ("--dataset", "mixture", "--dataset.sources", f"toy,text={OPEN}:1", f"toy,text={CLOSE}:1", "--trainer", "bc")


def forget(path: Path) -> None:
    """Remove the option from a record, as an older version has written it."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(one) for one in value]
        return (
            {k: without(v) for k, v in value.items() if k not in ("language", "instructions")}
            if isinstance(value, dict)
            else value
        )

    path.write_text(json.dumps(without(json.loads(path.read_text()))))


def test_runs_of_older_versions_have_a_table(script: Script) -> None:
    """They load, act and go on as they did; new ones begin from them by that option, which the refusal names."""
    language = ("--model.encoder.language", "table", "--dataset.no-instructions")
    old = script(*TWO, *language, "--steps", 4, folder="old")
    before = load_policy(old).act(STATE | {"task": CLOSE})
    forget(old / "policy" / "policy.json")
    forget(old / "args.json")
    record = json.loads((old / "args.json").read_text())
    words = record["argv"]
    at = words.index(language[0])
    (old / "args.json").write_text(json.dumps(record | {"argv": [*words[:at], *words[at + 3 :]]}))
    assert np.array_equal(load_policy(old).act(STATE | {"task": CLOSE}), before)
    assert isinstance(load_policy(old).module.encoder.task, TaskTable)
    args = renewed(record, REGISTRIES)["args"]
    assert args["model_options"]["encoder"]["language"] == "table" and not args["dataset_options"]["instructions"]
    script("--resume", old, "--steps", 6)
    assert weights(old, "encoder").keys() == {"task.weight"}
    with pytest.raises(UserError, match="model 'encoder' does not fit: .*; it reads tasks by --model.encoder.language"):
        script(*TWO, "--steps", 2, "--init-from", old, folder="begun")


def test_a_run_goes_on_and_its_policy_stands_alone(script: Script) -> None:
    """Byte for byte; a new wording is understood by what was loaded, and other tasks may follow."""
    whole = script(*TWO, "--steps", 6, "--save-every", 3, folder="whole")
    parts = script(*TWO, "--steps", 6, "--save-every", 3, folder="parts")
    shutil.rmtree(parts / "checkpoints" / "step-000000006")
    shutil.rmtree(parts / "policy")
    status = json.loads((parts / "status.json").read_text())
    (parts / "status.json").write_text(json.dumps(status | {"state": "preempted", "step": 3}))
    script("--resume", parts)
    assert states(whole) == states(parts)
    policy = load_policy(whole, task="Pull the drawer open")
    assert np.isfinite(policy.act(STATE)).all()
    text = "open the door"
    more = script(*TWO[:4], f"toy,text={text}:1", "--trainer", "bc", "--steps", 2, "--init-from", whole, folder="more")
    assert load_policy(more).spec["task"]["values"] == [OPEN, text]
