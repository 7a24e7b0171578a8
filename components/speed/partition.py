"""What a compiled forward pass keeps for its backward pass on a CPU; imported late, as inductor takes its time."""

from typing import Any

from torch._functorch.partitioners import default_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn


class AsInEager(CustomPartitionerFn):
    """Keeps what eager mode keeps.

    Inductor by itself keeps small masks, and on a CPU writes those of a ReLU slower than it multiplies matrices, so
    that compiled losses took longer than eager ones.
    """

    def __call__(self, gm: Any, joint_inputs: Any, compiler: Any = None, **keywords: Any) -> Any:
        """The graphs of both passes, from the joint one."""
        forward, backward = default_partition(gm, joint_inputs, **keywords)
        # What is left over must not run again: above all it would draw again.
        backward.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return forward, backward

    def uuid(self) -> str:
        """Part of the key of inductor's cache; changes with the above."""
        return "as in eager 1"
