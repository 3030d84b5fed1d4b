"""Memory of one GPU in a training step: parameters, gradients, optimizer, activations.

Parameters and their state follow the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054,
section 3): two bytes of weight and of gradient, twelve of float32 master and Adam's moments for
each parameter that learns. Activations are the tensors that autograd keeps, layer by layer, as the
network's own code saves them; `tests/sailyard/test_plan_memory.py` holds both against what a small
network really keeps.

Letters: D decoder width, Q query width, K key width, I feed-forward width (all visited experts
together), W tower width, F its feed-forward width, V vocabulary; e bytes of a computed value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailyard.plan.network import PARTS, Learning, Network

Parallel = Literal["none", "zero1", "zero2", "zero3"]
PARALLEL: tuple[Parallel, ...] = ("none", "zero1", "zero2", "zero3")

MASTER_AND_MOMENTS = 12  # bytes: float32 weight, first and second moment
BUCKET = 500_000_000  # gradients that DeepSpeed reduces at once (reduce_bucket_size, its default)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stage is spread over its GPUs.

    Attributes:
        parallel: none is plain torch (float32 weights under autocast); zero1 shards the optimizer,
            zero2 gradients too, zero3 weights too, all with bfloat16 weights and a float32 master.
        offload: gradients' shards, master and moments live in the host's memory (ZeRO only).
        checkpointing: a layer keeps its input only and is computed again in the backward pass.
        micro_batch: rows in one forward and backward pass.
        gpus: data-parallel ranks.
        expert_parallel: ranks that share one copy of the experts; 1 for a copy on each.
    """

    parallel: Parallel
    offload: bool
    checkpointing: bool
    micro_batch: int
    gpus: int
    expert_parallel: int = 1

    @property
    def words(self) -> str:
        """For people."""
        parts = ["plain" if self.parallel == "none" else f"ZeRO-{self.parallel[-1]}"]
        parts += ["CPU offload"] if self.offload else []
        parts += ["activation checkpointing"] if self.checkpointing else []
        parts += [f"expert parallel {self.expert_parallel}"] if self.expert_parallel > 1 else []
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, and beside it on the host.

    Attributes:
        weights: parameters as the forward pass reads them.
        gradients: of the parameters that learn, reduction bucket included.
        optimizer: float32 master and Adam's moments.
        activations: what autograd keeps of one micro-batch.
        logits: the output layer's, and their gradient, in float32 and the compute type.
        gathered: ZeRO-3's parameters of the layer at work and of the next one.
        host: CPU memory per GPU, with offload.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    host: int

    @property
    def total(self) -> int:
        """On the GPU."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.gathered
        )


def decoder_layer_bytes(network: Network, e: int, learns: bool) -> int:
    """What one decoder layer keeps per token.

    Each RMSNorm computes in float32: it keeps its input so (4), and for its weight's gradient the
    normed value (e). Matrices keep their input for their gradient. Attention keeps query, output,
    and keys and values repeated to the query's heads. SwiGLU keeps gate, silu(gate), up, product;
    our fused experts keep gate and up alone.
    """
    language = network.shape.language
    d, q, k = language.hidden_size, network.query_width, network.key_width
    size = 2 * 4 * d + 4 * (q + k) + 4 * q * e
    if learns:  # inputs of norms' weights, of q, k, v, of o, and of the feed-forward
        size += 2 * 2 * d * e + (q + k) * e + q * e
    moe = language.moe
    if moe is None:
        return size + (4 if learns else 3) * language.intermediate_size * e
    # The experts' input is kept whether they learn or not; softmaxes of router and balance loss.
    size += 0 if learns else d * e
    size += 2 * moe.top_k * moe.expert_intermediate_size * e
    return size + 3 * 4 * moe.num_experts


def tower_layer_bytes(network: Network, e: int) -> int:
    """What one layer of a tower that learns keeps per patch.

    Norms, attention and SwiGLU as in the decoder, without norms of queries and keys. Tiles come out
    of a convolution channel by channel, so each of the five matrices that read a norm makes its own
    contiguous copy (three more than shared inputs would take); packed images copy once, when their
    groups are put back in order.
    """
    vision = network.shape.vision
    w, f = vision.hidden_size, vision.intermediate_size
    copies = 1 if network.shape.any_resolution else 3
    return 2 * w * (4 + 2 * e) + (4 + copies) * w * e + 4 * f * e


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes kept of one row: per visual token, per token, per labelled token."""

    per_visual_token: float
    per_token: float
    per_label: float


def activations(network: Network, learning: Learning, e: int, checkpointing: bool) -> Activations:
    """What a row keeps for its backward pass.

    With checkpointing the layers keep their inputs, and one layer at a time is whole again.
    """
    shape = network.shape
    vision, language = shape.vision, shape.language
    w, d, squares = vision.hidden_size, language.hidden_size, shape.downsample**2
    visual = 0.0
    if learning.passes("vision"):
        layer = tower_layer_bytes(network, e)
        layers = vision.num_layers * w * e + layer if checkpointing else vision.num_layers * layer
        ends = 3 * vision.patch_size**2 * e + w * (4 + e) + w * (4 + e)
        visual += squares * (layers + ends)
    if learning.passes("adapter"):  # input and output of LayerNorm, of GELU
        visual += 2 * squares * w * e + 2 * d * e
    learns = learning.learns("language")
    layer = decoder_layer_bytes(network, e, learns)
    layers = language.num_layers * d * e + layer if checkpointing else language.num_layers * layer
    token = layers + d * (4 + (e if learns else 0))
    label = language.vocab_size * 4 + (d * e if learns else 0)
    return Activations(visual, token, label)


def memory_of(
    network: Network, learning: Learning, layout: Layout, seq_len: int, *, e: int = 2
) -> Memory:
    """Memory of one GPU at its worst row: all images, or all text with a loss on every token.

    Args:
        seq_len: tokens of a row.
        e: bytes of a computed value: 2 for bfloat16, 4 for float32.

    Raises:
        ValueError: a layout that does not exist.
    """
    _check(network, layout)
    plain, zero = layout.parallel == "none", PARALLEL.index(layout.parallel)
    shard = 1 if plain else layout.gpus
    local = _local(network.total, network.counted.experts, layout)
    trained = learning.trained(network)
    local_trained = _local(trained, learning.trained_experts(network), layout)

    weights: float = 4 * local if plain or e == 4 else 2 * local
    gathered = 0.0
    if zero == 3:
        whole = weights
        weights = (4 if e == 4 else 2) * network.total / shard  # experts end up spread over all
        gathered = min(2 * e * network.largest_block, whole - weights)
    if plain and e == 2:  # autocast's copies, which the backward pass reads
        gathered = 2.0 * sum(network.params(part) for part in PARTS if learning.passes(part))

    grad_bytes = 4 if plain else e
    gradients: float = grad_bytes * local_trained
    # A whole matrix of experts lies on few ranks: its state is spread over all of them in the end.
    optimizer: float = (8 if plain or e == 4 else MASTER_AND_MOMENTS) * trained / shard
    if plain:
        optimizer = 8 * local_trained
    if zero >= 2:
        sharded = grad_bytes * trained / shard
        bucket = min(grad_bytes * BUCKET, max(gradients - sharded, 0))
        gradients = bucket + (0 if layout.offload else sharded)
    host = 0.0
    if layout.offload:
        host = optimizer + 4 * trained / shard  # float32 gradients beside master and moments
        optimizer = 0

    kept = activations(network, learning, e, layout.checkpointing)
    tokens = seq_len * layout.micro_batch
    logits = tokens * network.shape.language.vocab_size * (4 + 2 * e)
    pictures = tokens * kept.per_visual_token
    if not learning.uses_vision:
        pictures = 0
    words = tokens * kept.per_label + logits
    worst_is_text = words >= pictures
    return Memory(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(
            tokens * kept.per_token + (tokens * kept.per_label if worst_is_text else pictures)
        ),
        logits=logits if worst_is_text else 0,
        gathered=round(gathered),
        host=round(host),
    )


def _local(params: int, experts: int, layout: Layout) -> float:
    """Parameters of which this rank holds a copy when nothing else is sharded."""
    return params - experts + experts / layout.expert_parallel


def _check(network: Network, layout: Layout) -> None:
    moe = network.shape.language.moe
    if layout.offload and layout.parallel not in ("zero2", "zero3"):
        raise ValueError(
            "--offload needs --parallel zero2 or zero3: the others keep all on the GPU"
        )
    degree = layout.expert_parallel
    if degree > 1 and moe is None:
        raise ValueError(f"--expert-parallel {degree}: the recipe's model has no experts")
    if degree > 1 and moe is not None and (moe.num_experts % degree or layout.gpus % degree):
        raise ValueError(
            f"--expert-parallel {degree} must divide the {moe.num_experts} experts and the "
            f"{layout.gpus} GPUs"
        )
