"""Prove that a change of the code changes no number: record short seeded runs before it, compare them after it.

python tests/same_numbers.py record before.json                       # the tree that this file is in, or --root TREE
python tests/same_numbers.py compare before.json                      # a line a case; exits with 1 where any differs
python tests/same_numbers.py compare before.json --only 'sac*' --keep runs/same     # some cases, run folders left there

Equal are the tensors of the final policy, the logs without times, and which checkpoint is the best one. This holds on
the same machine with the same packages. `record --only` replaces these cases in the file and leaves the others.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

TIMES = ("data_s", "step_s", "samples_per_s", "env_steps_per_s")
LOGS = ("metrics", "eval", "episodes")
OFFLINE = "offline_trainer.py --plugins toy --dataset toy --batch-size 16 --steps 100 --log-every 20 --eval-every 30"
OFFLINE += " --eval-episodes 3 --save-every 40 --save-minutes 0 --hang-timeout 300 --optimizer.lr 1e-3"
ROLLOUTS = "online_trainer.py --plugins toy --env savable --num-envs 2 --batch-size 10 --steps 120 --log-every 20"
ROLLOUTS += " --eval-every 30 --eval-episodes 3 --save-every 40 --save-minutes 0 --hang-timeout 300"
ONLINE = ROLLOUTS.replace("--batch-size 10", "--batch-size 16 --learning-starts 40")
CLONED = "--learning-starts 20 --dataset toy --dataset.action-scale 4 --reward-scale 1"
RECORDED = "--eval-episodes 0 --steps 40 --log-every 10"
UNIT = "--dataset.action-scale 4"  # brings the toy's actions into [-1, 1]
HELD = f"{UNIT} --dataset.validation 0.2"  # offline RL holds nothing out by itself
ACTOR = "--model.hidden-dims 16"
CRITIC = f"{ACTOR} --model.critic.hidden-dims 16"
VALUES = f"{CRITIC} --model.value.hidden-dims 16"
FLOW = f"{CRITIC} --model.flow.hidden-dims 16"
HIGH = f"{ACTOR} --model.value.hidden-dims 16 --model.high.hidden-dims 16 --model.representation.hidden-dims 16"
GOALS = "--env gymnasium --env.id TendonGoal-v0"
ACT = "--model.width 16 --model.layers 1 --dataset.action-steps 4"
CHANNELS = "--model.channels 16 --dataset.action-steps 8"
TRANSFORMER = "--model transformer --model.width 16 --model.layers 1 --dataset.obs-steps 3 --dataset.action-steps 4"
DIT = "--model dit --model.width 16 --model.layers 1 --dataset.action-steps 8"
PUSH = "--dataset lerobot --dataset.path tests/fixtures/lerobot_v30_image --dataset.cameras corner2"
CHANGED = "--augment.crop 56 60 --augment.shift 2 --augment.hue 0.1 --augment.contrast 0.2"
SOURCES = "tests/fixtures/lerobot_v30_image:0.7 minari=tests/fixtures/minari/metaworld/push-state-arrow-v0:0.3"
CARTPOLE = "--env gymnasium --env.id CartPole-v1 --env.max-episode-steps 50"

# {CASE} is the run folder of another case, which runs first.
OFFLINE_CASES = f"""
bc: --trainer bc
act: --trainer act {ACT}
diffusion: --trainer diffusion {CHANNELS}
flow: --trainer flow {CHANNELS}
td3_bc: --trainer td3_bc {CRITIC} {HELD}
iql: --trainer iql {VALUES} {HELD}
awac: --trainer awac {CRITIC} {UNIT}
cql: --trainer cql {CRITIC} {HELD}
rebrac: --trainer rebrac {CRITIC} {UNIT}
fql: --trainer fql {FLOW} {HELD}
ifql: --trainer ifql {VALUES} {UNIT}
qc: --trainer qc {FLOW} {HELD}
gcbc: --trainer gcbc {ACTOR} {GOALS}
recap: --trainer recap --trainer.chunk 3 --model.value.hidden-dims 16 --model.hidden-dims 16 {UNIT}
gciql: --trainer gciql {VALUES} {HELD} {GOALS}
hiql: --trainer hiql {HIGH} --dataset.validation 0.2 {GOALS} --trainer.subgoal-steps 3
offline-sac: --trainer sac {CRITIC} {UNIT}
offline-td3: --trainer td3 {CRITIC} {UNIT}
ema: --trainer bc --ema-decay 0.9 --optimizer adam --optimizer.schedule linear --optimizer.warmup-steps 10
accumulation: --trainer bc --grad-accumulation 2 --grad-clip 0.5 --optimizer sgd --optimizer.lr 0.1
bf16: --trainer bc --mixed-precision bf16 --optimizer.schedule onecycle
dropout: --trainer bc --model.dropout 0.2 --model.layer-norm --dataset.validation 0.2 --normalise observation=min_max
schedulefree: --trainer bc --model resmlp --optimizer schedulefree --loss huber
mixture-head: --trainer bc --model.head mixture --loss nll --dataset.action-steps 4 --policy.action-steps 3
codebook: --trainer bc --model.head codebook --model.codes 4 --loss l1 --dataset.action-steps 4 --policy.sampler sample
experts: --trainer bc --model.experts 3 --model.hidden-dims 16
gru: --trainer bc --model gru --model.head gaussian --loss nll --dataset.obs-steps 3
transformer: --trainer bc {TRANSFORMER} --loss sinkhorn --policy.ensemble 0.1
act-clipped: --trainer act {ACT} --model.dropout 0 --grad-clip 0.1 --policy.ensemble 0.01
diffusion-noise: --trainer diffusion {CHANNELS} --trainer.prediction epsilon --policy.sampler ddpm
diffusion-v: --trainer diffusion {DIT} --trainer.prediction v --trainer.schedule linear --dataset.obs-steps 2
flow-midpoint: --trainer flow {DIT} --trainer.coupling ot --policy.sampler midpoint --policy.action-steps 2
flow-shortcut: --trainer flow {DIT} --trainer.objective shortcut --policy.sampling-steps 1
td3_bc-plain: --trainer td3_bc {CRITIC} {UNIT} --normalise action=scale observation=none --grad-clip 0.1
iql-n-step: --trainer iql {VALUES} {HELD} --trainer.n-step 3 --normalise reward=return_range --grad-clip 0.5
cql-calibrated: --trainer cql {CRITIC} {UNIT} --trainer.calibrated --mixed-precision bf16
qc-best: --trainer qc {FLOW} {UNIT} --trainer.method best_of_n --trainer.chunk 3
gciql-awr: --trainer gciql {VALUES} {UNIT} {GOALS} --trainer.extraction awr
init-from: --trainer bc --init-from {{bc}} --optimizer.lr 1e-4
load: --trainer iql {VALUES} {HELD} --load critic={{iql}} value={{iql}} --freeze value
plugin-minimal: --trainer minimal --dataset minimal_data
plugin-keywords: --trainer with_keywords --dataset minimal_data --seed 3
plugin-actor-critic: --trainer actor_critic --model.critic.width 8 --seed 1
pictures: --trainer bc --model cnn {PUSH} {CHANGED} --workers 1 {RECORDED}
pictures-resnet: --trainer bc --model resnet18 {PUSH} --dataset.cache memory --ema-decay 0.9 {RECORDED} --steps 12
pictures-act: --trainer act {ACT} --load encoder={{pictures}} --freeze encoder {PUSH} {CHANGED} --workers 0 {RECORDED}
mixture: --trainer bc --dataset mixture --dataset.sources {SOURCES} {RECORDED}
video: --trainer diffusion {CHANNELS} --dataset lerobot --dataset.path tests/fixtures/lerobot_v30_video {RECORDED}
d4rl: --trainer iql {VALUES} --dataset d4rl --dataset.path tests/fixtures/d4rl/push.hdf5 {RECORDED}
robomimic: --trainer flow {CHANNELS} --dataset robomimic --dataset.path tests/fixtures/robomimic/push_low_dim.hdf5 \
  {RECORDED}
zarr: --trainer bc --dataset zarr --dataset.path tests/fixtures/zarr/push_replay.zarr {RECORDED}
ogbench: --trainer hiql {HIGH} --dataset ogbench \
  --dataset.path tests/fixtures/ogbench/pointmaze-medium-navigate-mini.npz {RECORDED}
minari: --trainer bc --dataset minari --dataset.path tests/fixtures/minari/pendulum/energy-v0 --env.max-episode-steps 20
metaworld: --trainer rebrac {CRITIC} --dataset metaworld --dataset.demos 6 --dataset.noise 0.3 --dataset.random 0.5 \
  --dataset.max-episode-steps 40
rollouts: --trainer awac {CRITIC} --dataset gymnasium --dataset.id Pendulum-v1 --dataset.episodes 4 {UNIT} \
  --env.max-episode-steps 30
"""
ROLLOUT_CASES = f"""
ppo: --trainer ppo {ACTOR} --model.value.hidden-dims 16 --trainer.rollout 10 --trainer.epochs 2
ppo-discrete: --trainer ppo {ACTOR} {CARTPOLE} --trainer.rollout 20 --trainer.epochs 3 --trainer.target-kl 0.01
ppo-plain: --trainer ppo {ACTOR} --no-normalise-observations --no-normalise-rewards --trainer.rollout 15 --num-envs 4
ppo-pictures: --trainer ppo {ACTOR} --env pictures --env.discrete --model encoder=cnn --trainer.rollout 10
"""
ONLINE_CASES = f"""
sac: --trainer sac {CRITIC}
td3: --trainer td3 {CRITIC}
dqn: --trainer dqn {ACTOR} {CARTPOLE} --updates-per-step 1 --trainer.exploration-steps 60
rlpd: --trainer rlpd {CRITIC} --dataset toy {UNIT} --model.critic.members 3 --updates-per-step 2
residual: --trainer residual {CRITIC} --trainer.base {{mixture-head}} --updates-per-step 1
iql-online: --trainer iql {VALUES} --init-from {{iql}} {CLONED} --dataset.ratio 0.5
awac-online: --trainer awac {CRITIC} --init-from {{awac}} {CLONED} --dataset.ratio 0.25
cql-online: --trainer cql {CRITIC} --init-from {{cql}} {CLONED} --dataset.ratio 0.25
td3_bc-online: --trainer td3_bc {CRITIC} --init-from {{td3_bc}} --learning-starts 20
rebrac-online: --trainer rebrac {CRITIC} --init-from {{rebrac}} {CLONED}
fql-online: --trainer fql {FLOW} --init-from {{fql}} {CLONED}
ifql-online: --trainer ifql {VALUES} --init-from {{ifql}} {CLONED}
qc-online: --trainer qc {FLOW} --init-from {{qc}} {CLONED}
qc-best-online: --trainer qc {FLOW} --init-from {{qc-best}} {CLONED} --trainer.method best_of_n --trainer.chunk 3
iql-alone: --trainer iql {VALUES}
normalised: --trainer sac {CRITIC} --normalise-observations --normalise-rewards --trainer.n-step 3 --grad-clip 0.5
sac-same-step: --trainer sac {CRITIC} --env.mode SameStep --num-envs 3 --updates-per-step 0.5 --buffer-size 60
sac-bf16: --trainer sac {CRITIC} --mixed-precision bf16 --ema-decay 0.9 --env gymnasium --env.id Pendulum-v1 \
  --env.max-episode-steps 25
sac-workers: --trainer sac {CRITIC} --env gymnasium --env.id TendonToy-v0 --env.workers 2 --env.max-episode-steps 7
sac-faults: --trainer sac {CRITIC} --env faulty --env.at 17
sac-pictures: --trainer sac {CRITIC} --env pictures --model encoder=cnn --steps 70
dqn-pictures: --trainer dqn {ACTOR} --env pictures --env.discrete --model encoder=cnn --updates-per-step 0.5
td3-n-step: --trainer td3 {CRITIC} --trainer.n-step 3 --trainer.exploration-noise 0.3 --dataset toy {UNIT}
collected: --trainer sac {CRITIC} --save-dataset {{collected}}/data --save-what collected
residual-data: --trainer residual {CRITIC} --trainer.base {{bc}} --trainer.scale 2 --dataset minari \
  --dataset.path {{collected}}/data --dataset.validation 0 --updates-per-step 1
"""
# Other ways to run cases from above.
TWO = ("bc", "accumulation", "act", "diffusion", "td3_bc", "iql", "fql", "hiql", "sac", "rlpd", "ppo")
COMPILED = ("bc", "td3_bc", "iql", "cql", "sac", "ppo")
KILLED = {"dropout": "--steps 1000 --save-every 50", "sac": "--steps 600 --save-every 100"}
KILLED["ppo"] = KILLED["sac"]


def table() -> dict[str, tuple[str, str]]:
    """Of each case the way to run it (plain, two or killed) and its command line."""
    cases: dict[str, tuple[str, str]] = {}
    for script, text in ((OFFLINE, OFFLINE_CASES), (ROLLOUTS, ROLLOUT_CASES), (ONLINE, ONLINE_CASES)):
        named = dict(line.split(": ", 1) for line in text.strip().splitlines())
        cases |= {name: ("plain", f"{script} {options}") for name, options in named.items()}
    cases |= {f"{name}-two": ("two", cases[name][1]) for name in TWO}
    cases |= {f"{name}-compiled": ("plain", f"{cases[name][1]} --compile") for name in COMPILED}
    return cases | {f"{name}-killed": ("killed", f"{cases[name][1]} {more}") for name, more in KILLED.items()}


def last_word(text: str) -> str:
    """The last line that names an error, or else the last line; a launcher writes a frame of its own below."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (["no word", *lines] + [line for line in lines if re.match(r"\S*(E|e)rror: \S", line)])[-1]


def train(way: str, line: str, run: Path, root: Path) -> str:
    """Run one case to its end; returns the last line of what went wrong, or nothing."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "WANDB_"))}
    env = clean | {"PYTHONPATH": str(root / "tests"), "OMP_NUM_THREADS": "1"}
    launcher: list[str] = []
    if way == "two":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env["ACCELERATE_USE_CPU"] = "true"
        launcher = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--main_process_port", port]
    script, *options = line.split()
    words = [sys.executable, *launcher, script, *options, "--run-dir", str(run)]
    if way == "killed":
        job = subprocess.Popen(words, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while job.poll() is None and not list(run.glob("checkpoints/step-*")):
            time.sleep(0.001)
        job.kill()
        said = job.communicate()[0]
        if job.returncode != -signal.SIGKILL:
            return f"exit code {job.returncode} before it could be killed: {last_word(said)}"
        words = [sys.executable, script, "--plugins", "toy", "--resume", str(run)]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True)
    return f"exit code {done.returncode}: {last_word(done.stderr)}" if done.returncode else ""


def sha256_of_tensors(path: Path) -> str:
    """Of names, dtypes, shapes and bytes in a safetensors file, by name; its metadata does not count."""
    data, found = path.read_bytes(), hashlib.sha256()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        found.update(repr((name, header[name]["dtype"], header[name]["shape"])).encode())
        found.update(data[start + begin : start + end])
    return found.hexdigest()


def numbers(run: Path) -> dict[str, Any]:
    """Everything of a run that has to be the same."""
    best = run / "checkpoints" / "best"
    found: dict[str, Any] = {"policy": sha256_of_tensors(run / "policy" / "model.safetensors")}
    found |= {"best": best.readlink().name if best.is_symlink() else ""}
    for log in LOGS:
        path = run / f"{log}.jsonl"
        texts = path.read_text().splitlines() if path.exists() else []
        lines = [{k: v for k, v in json.loads(text).items() if k not in TIMES} for text in texts]
        found[log] = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()
        found[f"{log}_lines"] = lines
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys of two lines of a log under which they do not say the same; NaN is the same as NaN."""
    return [key for key in a | b if (key in a) != (key in b) or json.dumps(a[key]) != json.dumps(b[key])]


def told(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, and where first; nothing if all is the same."""
    if "error" in new:
        return f"FAILED {new['error']}"
    if "error" in old or old["command"] != new["command"]:
        return f"NOT COMPARED, for what was recorded is: {old.get('error') or 'another command'}"
    parts = [key for key in ("policy", "best", *LOGS) if old[key] != new[key]]
    for log in [log for log in LOGS if log in parts]:
        before, after = old[f"{log}_lines"], new[f"{log}_lines"]
        pairs = [(a, b, differing(a, b)) for a, b in zip(before, after, strict=False)]
        if len(before) != len(after):
            parts.append(f"{log} has {len(after)} lines, not {len(before)}")
        for a, b, keys in [pair for pair in pairs if pair[2]][:1]:
            shown = "; ".join(f"{key} {a.get(key)} -> {b.get(key)}" for key in keys[:3])
            parts.append(f"{log} first at step {a.get('step')} in {len(keys)} keys: {shown}")
    return ("DIFFERENT " + ", ".join(parts)) if parts else ""


def results(names: list[str], runs: Path, root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run cases, each after those whose runs it begins from; gives the numbers, or the error of a failed one."""
    cases, errors = table(), dict[str, str]()

    def run(name: str) -> None:
        way, line = cases[name]
        for other in set(re.findall(r"\{(.+?)\}", line)) - errors.keys() - {name}:
            run(other)
        errors[name] = train(way, re.sub(r"\{(.+?)\}", rf"{runs}/\1", line), runs / name, root)

    for name in names:
        if name not in errors:
            run(name)
        try:
            found = {"error": errors[name]} if errors[name] else numbers(runs / name)
        except (OSError, ValueError, KeyError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        yield name, {"command": " ".join(cases[name])} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases, as in a shell: 'sac*'")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="tree whose scripts run")
    parser.add_argument("--keep", type=Path, help="new folder for the runs, which stay there")
    args = parser.parse_args()
    record, packages = args.what == "record", {name: version(name) for name in ("torch", "numpy", "gymnasium")}
    fresh = record and (args.only == ["*"] or not args.file.exists())
    known: dict[str, Any] = {"packages": packages, "cases": {}} if fresh else json.loads(args.file.read_text())
    if known["packages"] != packages:
        print(f"other packages: {known['packages']} when it was recorded, {packages} now")
    if args.keep:
        args.keep.mkdir(parents=True)
    names = [name for name in table() if any(fnmatch(name, pattern) for pattern in args.only)]
    began = since = time.monotonic()
    wrong = 0
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="same-") as runs:
        for name, found in results(names, Path(runs).resolve(), args.root.resolve()):
            old = found if record else known["cases"].get(name, {"error": "nothing"})
            said = told(old, found) or ("recorded" if record else "same")
            known["cases"][name] = found
            wrong += said not in ("recorded", "same")
            print(f"{name:20s} {time.monotonic() - since:5.1f} s  {said}", flush=True)
            since = time.monotonic()
    if record:
        args.file.write_text(json.dumps(known) + "\n")
    print(f"{len(names)} cases, {wrong} of them {'failed' if record else 'not the same'}, {since - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
