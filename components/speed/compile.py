"""--compile: compiles the losses, and measures the gain and the step from which the compilation pays off."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..contracts import losses_of, promises_of
from ..data.random_state import preserved
from ..errors import UserError
from ..learning.held_out import total_loss
from . import cuda_graphs

TIMES = 5


def compiled(learner: Any, say: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """The learner's `update` with compiled losses and, on a GPU, as CUDA graphs; its first call reports the gain.

    Raises UserError: its trainer has no `losses(data)`.
    """
    compile_losses(learner.trainer, learner.device)
    update, note = cuda_graphs.choose(learner)
    fresh = True

    def call(batch: dict[str, Any]) -> None:
        nonlocal fresh
        if fresh:
            fresh = False
            say(break_even(learner.trainer, batch, learner.models))
            say(note)
            learner.forget_losses()  # those of the measurement
        update(batch)

    return call


def compile_losses(trainer: Any, device: torch.device) -> None:
    """Replace the losses of a trainer by ones that compile at their first call.

    Raises:
        UserError: the trainer lacks `losses(data)`, or a method that its `promises` name.
    """
    methods = {name: losses_of(trainer, name) for name in ("losses", *promises_of(trainer).compiles)}
    for name, method in methods.items():
        if method is None:
            raise UserError(f"--compile needs a trainer with {name}(data)")
    import torch._functorch.config as functorch  # slow to import
    import torch._inductor.config as inductor

    inductor.fallback_random = True  # the same random numbers as without --compile
    functorch.cse = False  # it would merge two draws of `randn_like` of one tensor
    inductor.custom_partitioner_fn = as_in_eager() if device.type == "cpu" else None
    for name in promises_of(trainer).compiles:
        setattr(trainer, name, torch.compile(methods[name]))


def as_in_eager() -> Any:
    """A partitioner with which a compiled forward pass saves the same tensors for its backward pass as eager mode.

    Inductor's default saves small masks. On a CPU, writing those of a ReLU is slower than multiplying matrices, which
    made compiled losses slower than eager ones.
    """
    from torch._functorch.partitioners import default_partition  # slow to import
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class AsInEager(CustomPartitionerFn):
        def __call__(self, gm: Any, joint_inputs: Any, compiler: Any = None, **keywords: Any) -> Any:
            """The graphs of both passes, from the joint one."""
            forward, backward = default_partition(gm, joint_inputs, **keywords)
            # Dead code must not run again: above all, it would draw random numbers again.
            backward.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
            return forward, backward

        def __reduce__(self) -> Any:
            """Inductor pickles it for that key, and without a key compiles anew in each process."""
            return as_in_eager, ()

        def uuid(self) -> str:
            """Part of the key of inductor's cache; must change with the code above."""
            return "as in eager 1"

    return AsInEager()


def break_even(trainer: Any, batch: dict[str, Any], models: nn.Module) -> str:
    """Compile the losses of a trainer now; returns a line with the step from which the compilation pays off.

    Preserves the random state and the buffers; sets the gradients to None.

    Args:
        trainer: After `compile_losses`; its class has the original methods.
        batch: A batch as `train_step` receives it.
        models: All models of the trainer.
    """
    buffers = [(buffer, buffer.clone()) for buffer in models.buffers()]
    eager = compiled = compiling = 0.0  # seconds
    with preserved():
        for name in promises_of(trainer).compiles:
            eager += median(losses_of(trainer, name), batch)
            method = vars(trainer)[name]
            began = time.perf_counter()
            gradient(method, batch)
            compiling += time.perf_counter() - began
            compiled += median(method, batch)
    for parameter in models.parameters():
        parameter.grad = None
    for buffer, before in buffers:
        buffer.copy_(before)
    pays = f"pays from step {compiling / (eager - compiled):.0f} on" if compiled < eager else "gains nothing here"
    times = f"{1000 * compiled:.2f} ms a step instead of {1000 * eager:.2f}"
    return f"--compile: {compiling:.0f} s of compiling; losses and gradients take {times}: it {pays}"


def median(method: Any, batch: dict[str, Any]) -> float:
    """Median seconds of a loss and its gradient, after an uncounted first time."""
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        gradient(method, batch)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[TIMES // 2]


def gradient(method: Any, batch: dict[str, Any]) -> None:
    """Compute a loss and its gradient, and wait for the GPU."""
    loss = total_loss(method(batch))
    loss.backward()
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
