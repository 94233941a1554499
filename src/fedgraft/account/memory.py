"""An estimate of what training takes in memory: exact for what is stored, a count of the saved tensors for activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgraft.account.compute import Compute
from fedgraft.account.layers import Experts, Layer
from fedgraft.training.settings import TrainingSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LEAF = 4  # leaves, gradients and moments are fp32
COPIES = 5
"""Of every trained leaf: the start that the client keeps, the leaf, its gradient and AdamW's two moments."""

SLACK = 1.2
"""What temporary results and the allocator take on top of the tensors counted."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one forward of training is given."""

    length: int
    """Tokens a row, padding included."""
    rows: int
    """Rows of one forward: the batch, or a part of it under accumulation."""
    dtype: str = "float32"
    """Of the frozen base."""
    precision: str = "fp32"
    """Of the forward: `fp32` (as the base) or `bf16` (autocast)."""
    checkpointing: bool = False
    predicting: float = 1.0
    """Share of the positions whose next token belongs to a response: the others need no logits."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes while a client trains, by what they hold. An estimate: see `memory_of`."""

    weights: int
    casts: int
    """bf16 copies of fp32 matrices that autocast makes and backward needs."""
    leaves: int
    """Trained leaves: start, leaf, gradient, moments."""
    activations: int
    logits: int

    @property
    def training(self) -> int:
        """What training adds to the loaded base."""
        return self.casts + self.leaves + self.activations + self.logits

    @property
    def client(self) -> int:
        """What each client that trains at the same time adds; casts are made once for all."""
        return self.leaves + self.activations + self.logits

    def clients_within(self, room: int) -> int:
        """How many clients can train at once in `room` bytes beside the base, 1 at least."""
        return max(1, (room - self.casts) // self.client)

    @property
    def total(self) -> int:
        """All of it, without the libraries' own memory (about 0.5 GB)."""
        return self.weights + self.training


def workload(training: TrainingSettings, *, length: int, dtype: str, predicting: float = 1.0) -> Workload:
    """The forward that a recipe's training section runs."""
    return Workload(
        length=length,
        rows=-(-training.batch_size // training.accumulation),
        dtype=dtype,
        precision=training.precision,
        checkpointing=training.checkpointing,
        predicting=predicting,
    )


def memory_of(
    layers: Sequence[Layer], work: Workload, *, parameters: int, trained: int, vocabulary: int, hidden: int, grafts: int, compute: Compute
) -> Memory:
    """Estimate the peak while a client trains.

    Activations are what autograd keeps of a token in a layer: fp32 copies in the norms, q, k, v and the mixture, expert inputs, gate, up,
    hidden and weighted output for each of the k experts, the shared experts and every graft. Measured on the embedded base (CPU, 128 to
    1,024 tokens, 4 and 16 rows) the process grew by 0.98 to 1.05 times this, by 1.06 with checkpointing, by 1.2 in bf16. Other kernels can
    move it by a factor of 2.

    Args:
        layers: each decoder layer alone.
        work: the forward.
        parameters: of the model.
        trained: entries of the trained leaves.
        vocabulary: its size.
        hidden: width of the residual stream.
        grafts: grafted experts per layer; 0 without a graft.
        compute: FLOPs of a forward, which know how many matrices take part.
    """
    tokens, element = work.rows * work.length, 2 if work.precision == "bf16" else BYTES[work.dtype]
    each = [_layer(layer, hidden, element, grafts) for layer in layers]
    kept = len(each) * hidden * element + 2 * max(each) if work.checkpointing else sum(each)
    cast = work.precision == "bf16" and work.dtype == "float32"
    matrices = (compute.shared + compute.other + compute.head) // 2 + sum(_all(layer.experts) for layer in layers)
    return Memory(
        weights=parameters * BYTES[work.dtype],
        casts=(matrices // len(layers) if work.checkpointing else matrices) * 2 if cast else 0,
        leaves=COPIES * LEAF * trained,
        activations=round(SLACK * tokens * kept),
        logits=round(SLACK * tokens * work.predicting) * vocabulary * (3 * LEAF),  # logits, their softmax and its gradient
    )


def _layer(layer: Layer, hidden: int, element: int, grafts: int) -> int:
    """Bytes that one token leaves in a layer for backward."""
    norms = 4 * hidden * LEAF
    linears = sum(linear.outputs for linear in layer.at("attention", "mixer"))
    adapted = sum(linear.inputs for linear in layer.linears if linear.adapted)
    dense = 3 * sum(linear.outputs for linear in layer.at("linear")) // 2
    experts = 0
    if layer.experts is not None:
        unit = 4 * layer.experts.width + 2 * layer.experts.inputs
        experts = unit * (layer.experts.top_k + grafts) + 4 * layer.experts.shared // (3 * hidden)
    return norms + element * (2 * linears + adapted + dense + experts)


def _all(experts: Experts | None) -> int:
    return experts.number * experts.parameters if experts is not None else 0
