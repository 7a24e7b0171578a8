"""Training steps and plans of the code that ours is measured against, built from checkouts of it, as it is.

What the checkouts import for their environments, logs and files is left out. Everything takes a device, so that the
same steps are measured on a CPU and on a GPU.
"""

import copy
import importlib
import importlib.util
import io
import itertools
import os
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from clock import learned
from torch import Tensor, nn

Step = Callable[[], Any]
Arrays = dict[str, Any]  # observations, next_observations, actions, rewards, terminals, masks
JAX_PACKAGES = "jax flax optax distrax ml_collections"
STATE = "observation.state"


class Peer(NamedTuple):
    """A training step, how many numbers it learns, and what waits until all of it is done."""

    step: Step
    learned: int
    wait: Step | None = None


# ---- offline RL ----------------------------------------------------------------------------------------------------


def corl_parts(name: str, corl: Any, state: int, action: int) -> tuple[Any, dict[str, nn.Module], dict[str, Any]]:
    """CORL's trainer, networks and settings from its module."""
    sizes = (state, action)
    match name:
        case "bc":
            return corl.BC, {"actor": corl.Actor(*sizes, 1.0)}, {"max_action": 1.0}
        case "td3_bc":
            critics = {"critic_1": corl.Critic(*sizes), "critic_2": corl.Critic(*sizes)}
            return corl.TD3_BC, {"actor": corl.Actor(*sizes, 1.0)} | critics, {"max_action": 1.0}
        case "iql":
            values = {"q_network": corl.TwinQ(*sizes), "v_network": corl.ValueFunction(state)}
            return corl.ImplicitQLearning, {"actor": corl.GaussianPolicy(*sizes, 1.0)} | values, {"max_action": 1.0}
        case "awac":
            critics = {"critic_1": corl.Critic(*sizes, 256), "critic_2": corl.Critic(*sizes, 256)}
            return corl.AdvantageWeightedActorCritic, {"actor": corl.Actor(*sizes, 256)} | critics, {}
    critics = {f"critic_{i}": corl.FullyConnectedQFunction(*sizes, True, n_hidden_layers=3) for i in (1, 2)}
    settings = {"target_entropy": -float(action), "bc_steps": 0, "cql_n_actions": 10, "cql_alpha": 10.0}
    return corl.ContinuousCQL, {"actor": corl.TanhGaussianPolicy(*sizes, 1.0)} | critics, settings


def corl(name: str, checkout: Path, arrays: Arrays, batch: int, device: str = "cpu", compiled: bool = False) -> Peer:
    """An update of CORL's own classes: `sample` and `train`, what it logs thrown away.

    Compiled are the calls of its networks: around them, `train` reads numbers back from the device.
    """
    file = "any_percent_bc" if name == "bc" else name
    spec: Any = importlib.util.spec_from_file_location(file, checkout / "algorithms" / "offline" / f"{file}.py")
    module: Any = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, dict.fromkeys(("d4rl", "gym", "pyrallis", "tqdm", "wandb"), mock.MagicMock())):
        spec.loader.exec_module(module)
    torch.manual_seed(0)
    sizes = arrays["observations"].shape[1], arrays["actions"].shape[1]
    cls, networks, settings = corl_parts(name, module, *sizes)
    optimizers = {key: torch.optim.Adam(network.to(device).parameters(), lr=3e-4) for key, network in networks.items()}
    named = {f"{key.removesuffix('_network')}_optimizer": optimizer for key, optimizer in optimizers.items()}
    trainer = cls(**networks, **named, **settings, **({} if name == "awac" else {"device": device}))
    if compiled:
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False  # cql keeps its graph for a second backward
        for part in (*vars(trainer).values(), *networks.values()):
            for network in (part, *part.children()) if isinstance(part, nn.Module) else ():
                network.compile()
    buffer = module.ReplayBuffer(*sizes, len(arrays["actions"]), device)
    with redirect_stdout(io.StringIO()):
        buffer.load_d4rl_dataset(arrays)
    update = trainer.update if name == "awac" else trainer.train
    return Peer(lambda: update(buffer.sample(batch)), learned(networks.values()))


def jax_agent(name: str, checkout: Path, arrays: Arrays, batch: int) -> Peer:
    """A jitted update of an agent of seohongpark/fql or, for `qc`, of ColinQiyangLi/qc, with its own sampling.

    Raises ImportError where a package is missing.
    """
    sys.path.insert(0, str(checkout.resolve()))
    jax, agents = importlib.import_module("jax"), importlib.import_module("agents")
    dataset = importlib.import_module("utils.datasets").Dataset.create(**arrays)
    dataset.return_next_actions = name == "rebrac"
    key = "acfql" if name == "qc" else name
    config = importlib.import_module(f"agents.{key}").get_config()
    if name == "qc":
        config["horizon_length"] = 5
    first = dataset.sample(() if name == "qc" else 1)
    agent = agents.agents[key].create(0, first["observations"], first["actions"], config)
    updates, info = itertools.count(1), None

    def step() -> None:
        nonlocal agent, info
        delayed = {"full_update": next(updates) % config["actor_freq"] == 0} if name == "rebrac" else {}
        data = dataset.sample_sequence(batch, 5, 0.99) if name == "qc" else dataset.sample(batch)
        agent, info = agent.update(data, **delayed)

    parameters = {key: value for key, value in agent.network.params.items() if "target" not in key}
    size = sum(leaf.size for leaf in jax.tree_util.tree_leaves(parameters))
    return Peer(step, size, lambda: jax.block_until_ready((agent.network, info)))


# ---- imitation -----------------------------------------------------------------------------------------------------

OBS = (2, 20)  # steps and width of the states of diffusion_policy's problem; its chunks are 16 x 2


class Imitator(NamedTuple):
    """A training step, and what makes a plan for observations."""

    step: Step
    plan: Callable[[dict[str, Tensor]], Step]
    learned: int


def diffusion_policy(
    checkout: Path,
    network: str = "unet",
    batch: int = 256,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    toy: bool = False,
    flow: bool = False,
) -> Imitator:
    """The training step of diffusion_policy's workspaces, of its U-Net or its transformer, and DDIM in 10 steps.

    With `flow`, which its code does not have, the plan is its U-Net in 10 steps of Euler's method.
    """
    sys.path.insert(0, str(checkout.resolve()))
    from diffusers import DDIMScheduler, DDPMScheduler

    zarr: Any = types.ModuleType("zarr")
    zarr.Array = zarr.Group = type("Array", (), {})  # it asks whether its data is one
    with mock.patch.dict(sys.modules, {"zarr": zarr, "numcodecs": mock.MagicMock()}):
        averages = importlib.import_module("diffusion_policy.model.diffusion.ema_model")
        normalizers = importlib.import_module("diffusion_policy.model.common.normalizer")
        policies = importlib.import_module(
            f"diffusion_policy.policy.diffusion_{'unet' if network == 'unet' else 'transformer'}_lowdim_policy"
        )
    torch.manual_seed(0)
    schedule = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    noise = DDPMScheduler(**schedule, clip_sample=True, variance_type="fixed_small")
    policy = diffusion_policy_network(network, policies, noise, toy)
    data = {"obs": torch.randn(batch, 16, OBS[1]), "action": torch.randn(batch, 16, 2)}
    normalizer = normalizers.LinearNormalizer()
    normalizer.fit(data)
    policy.set_normalizer(normalizer)
    policy.to(device)
    data = {key: value.to(device) for key, value in data.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6)
    average = averages.EMAModel(copy.deepcopy(policy), power=0.75)
    if compiled:
        policy.model.compile()

    def step() -> None:
        policy.train()
        policy.noise_scheduler = noise
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = policy.compute_loss(data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(policy)
        loss.item()

    def plan(observation: dict[str, Tensor]) -> Step:
        seen = normalizer["obs"].normalize(observation[STATE]).flatten(1)

        @torch.no_grad()
        def euler() -> Tensor:
            policy.eval()
            x = torch.randn(len(seen), 16, 2, device=device)
            for i in range(10):
                x = x + 0.1 * policy.model(x, 10 * i, global_cond=seen)
            return normalizer["action"].unnormalize(x)

        @torch.no_grad()
        def chunk() -> Any:
            policy.eval()
            policy.noise_scheduler = DDIMScheduler(**schedule, clip_sample=True)
            return policy.predict_action({"obs": observation[STATE]})["action_pred"]

        return euler if flow else chunk

    return Imitator(step, plan, learned([policy]))


def diffusion_policy_network(network: str, policies: Any, noise: Any, toy: bool) -> Any:
    """diffusion_policy's policy for Push-T from states, on its U-Net or its transformer."""
    sizes = {"horizon": 16, "obs_dim": OBS[1], "action_dim": 2, "n_action_steps": 8, "n_obs_steps": OBS[0]}
    sizes |= {"num_inference_steps": 10}
    if network == "unet":
        unet = importlib.import_module("diffusion_policy.model.diffusion.conditional_unet1d")
        model = unet.ConditionalUnet1D(
            input_dim=2,
            global_cond_dim=OBS[0] * OBS[1],
            diffusion_step_embed_dim=256,
            down_dims=[64, 128] if toy else [256, 512, 1024],
            kernel_size=5,
            n_groups=8,
            cond_predict_scale=True,
        )
        return policies.DiffusionUnetLowdimPolicy(model, noise, **sizes, obs_as_global_cond=True)
    transformer = importlib.import_module("diffusion_policy.model.diffusion.transformer_for_diffusion")
    width, layers = (128, 3) if toy else (256, 8)
    dims: dict[str, Any] = {"input_dim": 2, "output_dim": 2, "horizon": 16, "n_obs_steps": OBS[0]}
    dims |= {"cond_dim": OBS[1], "n_layer": layers, "n_head": 4, "n_emb": width, "causal_attn": True}
    model = transformer.TransformerForDiffusion(**dims, p_drop_emb=0.0, p_drop_attn=0.3, obs_as_cond=True)
    return policies.DiffusionTransformerLowdimPolicy(model, noise, **sizes, obs_as_cond=True)


def lerobot_act(
    checkout: Path,
    batch: dict[str, Tensor],
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    toy: bool = False,
) -> Imitator:
    """The training step of LeRobot's ACT on a batch with `observation.state`, its pictures in uint8, and chunks.

    Of its modules only the network's file is imported; empty modules stand in the place of what that pulls in.
    """
    cameras = [key for key in batch if key.startswith("observation.images.")]
    act = lerobot_module(checkout, bool(cameras))
    state, action = batch[STATE].shape[-1], batch["action"].shape[-1]
    feature = types.SimpleNamespace(shape=(state,))
    config = types.SimpleNamespace(
        chunk_size=batch["action"].shape[1],
        robot_state_feature=feature,
        env_state_feature=feature if "observation.environment_state" in batch else None,
        action_feature=types.SimpleNamespace(shape=(action,)),
        image_features=cameras,
        vision_backbone="resnet18",
        replace_final_stride_with_dilation=False,
        pretrained_backbone_weights=None,
        use_vae=True,
        latent_dim=32,
        dim_model=64 if toy else 512,
        n_heads=8,
        dim_feedforward=128 if toy else 3200,
        feedforward_activation="relu",
        n_encoder_layers=4,
        n_vae_encoder_layers=4,
        n_decoder_layers=1,
        dropout=0.1,
        pre_norm=False,
        kl_weight=10.0,
    )
    torch.manual_seed(0)
    policy = types.SimpleNamespace(config=config, model=act.ACT(config).to(device), eval=lambda: policy.model.eval())
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5, weight_decay=1e-4)
    if compiled:
        policy.model.compile()

    def seen(data: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the device, pictures in [0, 1]."""
        data = {key: value.to(device, non_blocking=True) for key, value in data.items()}
        return data | {key: data[key].float() / 255 for key in cameras}

    def step() -> None:
        policy.model.train()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = act.ACTPolicy.forward(policy, seen(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    def plan(observation: dict[str, Tensor]) -> Step:
        observation = seen(observation)
        return lambda: act.ACTPolicy.predict_action_chunk(policy, observation)

    return Imitator(step, plan, learned([policy.model]))


def lerobot_module(checkout: Path, pictures: bool) -> Any:
    """The file of LeRobot's ACT; without pictures, torchvision is not needed."""
    source = checkout.resolve() / "src" / "lerobot"
    stands: dict[str, Any] = {}
    if not pictures:
        vision = ("torchvision", "torchvision.models", "torchvision.models._utils", "torchvision.ops")
        stands = {name: types.ModuleType(name) for name in (*vision, "torchvision.ops.misc") if name not in sys.modules}
    for name in ("lerobot", "lerobot.policies", "lerobot.policies.act", "lerobot.utils"):
        stands[name] = types.ModuleType(name)
        stands[name].__path__ = [str(source.joinpath(*name.split(".")[1:]))]
    for name in ("lerobot.policies.pretrained", "lerobot.policies.act.configuration_act"):
        stands[name] = types.ModuleType(name)
    sys.modules.update(stands)
    if not pictures:
        sys.modules["torchvision.models._utils"].IntermediateLayerGetter = object  # type: ignore[attr-defined]
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = object  # type: ignore[attr-defined]
    sys.modules["lerobot.policies.pretrained"].PreTrainedPolicy = nn.Module  # type: ignore[attr-defined]
    sys.modules["lerobot.policies.act.configuration_act"].ACTConfig = object  # type: ignore[attr-defined]
    return importlib.import_module("lerobot.policies.act.modeling_act")


# ---- online RL -----------------------------------------------------------------------------------------------------


class First(nn.Module):
    """The first output of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        result = self.function(*arguments)
        return result[0] if isinstance(result, tuple) else result


def run_script(path: Path, arguments: list[str]) -> None:
    """Run one of CleanRL's or LeanRL's scripts as it is, its logs thrown away, in a Gymnasium newer than theirs."""
    import runpy

    import gymnasium

    transform: Any = gymnasium.wrappers.TransformObservation
    # Gymnasium 1 asks for the space that comes out, which theirs keep; tensordict for as many names as outputs.
    gymnasium.wrappers.TransformObservation = lambda env, func: transform(env, func, env.observation_space)
    if "leanrl" in path.parts:
        importlib.import_module("torchrl.data")  # it has the class as it is
        tensordict = importlib.import_module("tensordict.nn")
        module = tensordict.TensorDictModule
        tensordict.TensorDictModule = lambda function, in_keys, out_keys: module(
            First(function) if len(out_keys) == 1 else function, in_keys, out_keys
        )
    sys.modules |= {name: mock.MagicMock() for name in ("wandb", "torch.utils.tensorboard")}
    sys.path[:0] = [str(path.resolve().parents[1]), str(path.resolve().parent)]
    sys.argv = [str(path), *arguments]
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    runpy.run_path(str(path), run_name="__main__")
