"""Memory of one GPU in a training step: parameters, gradients, optimizer, activations.

State follows `training/`: in plain torch weights, gradients and moments are float32 and forward
passes run under autocast; DeepSpeed's ZeRO holds the weights in the type of the products and its
slice of a float32 master beside them. What each stage shards is the ZeRO paper's (Rajbhandari et
al. 2020, arXiv:1910.02054, section 5). Activations are the tensors that autograd keeps under
autocast, layer by layer, as the network's own code saves them: for ZeRO, whose residual stream is
bfloat16, an upper bound. `tests/sailyard/test_plan_memory.py` holds both against what a small
network really keeps.

Letters: D decoder width, Q query width, K key width, I feed-forward width, W tower width, F its
feed-forward width, V vocabulary; e bytes of a product: 2 under autocast, 4 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailyard.plan.network import PARTS, Learning, Network

Parallel = Literal["ddp", "zero1", "zero2", "zero3"]
PARALLEL: tuple[Parallel, ...] = ("ddp", "zero1", "zero2", "zero3")

MOMENTS = 8  # bytes: Adam's first and second
MASTER = 4  # bytes: ZeRO's own copy of its share of the weights
LOGITS_AT_ONCE = 2**27  # as in model.output_layer, which nothing here may import
BUCKET = 500_000_000  # gradients that DeepSpeed reduces at once (reduce_bucket_size, its default)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stage is spread over its GPUs.

    Attributes:
        parallel: as in the recipe: ddp is plain torch, all state on each GPU; zero1 shards the
            optimizer, zero2 gradients too, zero3 weights too.
        offload: master and moments, and gradients' shards, live in the host's memory (ZeRO only).
        checkpointing: a layer keeps its input only and is computed again in the backward pass.
        micro_batch: rows in one forward and backward pass.
        gpus: data-parallel ranks.
        expert_parallel: ranks that share one copy of the experts (ddp only); 1 for a copy on each.
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
        parts = ["plain" if self.parallel == "ddp" else f"ZeRO-{self.parallel[-1]}"]
        parts += ["CPU offload"] if self.offload else []
        parts += ["activation checkpointing"] if self.checkpointing else []
        parts += [f"expert parallel {self.expert_parallel}"] if self.expert_parallel > 1 else []
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, and beside it on the host.

    Attributes:
        weights: parameters.
        copies: of weights in bfloat16, which autocast makes and the backward pass reads (not under
            ZeRO, whose weights are bfloat16 themselves).
        gradients: of the parameters that learn, reduction bucket included.
        optimizer: float32 master and Adam's moments.
        activations: what autograd keeps of one micro-batch.
        logits: the output layer's, and their gradient, in float32 and the compute type.
        gathered: ZeRO-3's parameters of the layer at work and of the next one.
        host: CPU memory per GPU, with offload.
    """

    weights: int
    copies: int
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
            + self.copies
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.gathered
        )


def decoder_layer_bytes(network: Network, e: int, learns: bool, spread: bool = False) -> int:
    """What one decoder layer keeps per token; `spread` for experts shared by ranks.

    A norm keeps its input in float32 and, for its weight's gradient, the normed value: float32 in
    the residual stream, e in queries and keys. Matrices keep their input for their gradient; under
    autocast each of the five that read the stream makes a copy of its own. Attention keeps query,
    output, and keys and values repeated to the query's heads. SwiGLU keeps gate, silu(gate), up and
    their product; our fused experts keep gate and up alone. Spread ones keep every slot that came,
    and every result that came back.
    """
    language = network.shape.language
    d, q, k = language.hidden_size, network.query_width, network.key_width
    size = 2 * 4 * d + 4 * (q + k) + 4 * q * e
    if learns:
        size += 2 * 4 * d + (q + k) * e + (5 if e == 2 else 2) * d * e + q * e
    moe = language.moe
    if moe is None:
        return size + (4 if learns else 3) * language.intermediate_size * e
    # The experts' input is kept whether they learn or not; softmaxes of router and balance loss.
    size += 0 if learns else d * e
    size += 2 * moe.top_k * moe.expert_intermediate_size * e
    size += 2 * moe.top_k * d * e if spread else 0
    return size + 3 * 4 * moe.num_experts


def tower_layer_bytes(network: Network, e: int) -> int:
    """What one layer of a tower that learns keeps per patch.

    As in the decoder, without norms of queries and keys. In float32, too, tiles have five inputs of
    matrices: they come out of a convolution channel by channel, so each makes a contiguous copy.
    Packed images copy the output of attention when their groups are put back in order.
    """
    vision = network.shape.vision
    w, f = vision.hidden_size, vision.intermediate_size
    native = network.shape.any_resolution
    inputs = (2 if native and e == 4 else 5) + (1 if native else 0)
    return 2 * 2 * 4 * w + (4 + inputs) * w * e + 4 * f * e


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes kept of one row: per visual token, per token, per labelled token."""

    per_visual_token: float
    per_token: float
    per_label: float


def activations(
    network: Network, learning: Learning, e: int, checkpointing: bool, spread: bool = False
) -> Activations:
    """What a row keeps for its backward pass; `spread` for experts shared by ranks.

    With checkpointing the layers keep their inputs, and one layer at a time is whole again.
    """
    shape = network.shape
    vision, language = shape.vision, shape.language
    w, d, squares = vision.hidden_size, language.hidden_size, shape.downsample**2
    visual = 0.0
    if learning.passes("vision"):
        layer = tower_layer_bytes(network, e)
        layers = vision.num_layers * w * 4 + layer if checkpointing else vision.num_layers * layer
        ends = 3 * vision.patch_size**2 * e + w * (4 + e) + 2 * 4 * w
        visual += squares * (layers + ends)
    if learning.passes("adapter"):  # LayerNorm's input and output, GELU's; what joins the words
        visual += squares * w * (4 + e) + 2 * d * e + (4 * d if e == 2 else 0)
    learns = learning.learns("language")
    layer = decoder_layer_bytes(network, e, learns, spread)
    layers = language.num_layers * d * 4 + layer if checkpointing else language.num_layers * layer
    token = layers + 4 * d * (2 if learns else 1)
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
    zero = PARALLEL.index(layout.parallel)
    local = _local(network.total, network.counted.experts, layout)
    trained = learning.trained(network)

    stored = e if zero else 4  # bytes of a weight
    weights, gathered = stored * local, 0.0
    if zero == 3:  # experts end up spread over all
        whole, weights = weights, stored * network.total / layout.gpus
        gathered = min(2 * stored * network.largest_block, whole - weights)

    learnt = _local(trained, learning.trained_experts(network), layout)
    # ZeRO-1 adds bfloat16 gradients up in float32, and both are there at the end.
    gradients = (6 if zero == 1 and e == 2 else 4) * learnt
    if zero >= 2:
        sharded = 4 * trained / layout.gpus
        bucket = min(stored * BUCKET, max(gradients - sharded, 0))
        gradients = bucket + (0 if layout.offload else sharded)
    if zero:
        optimizer = (MASTER + MOMENTS) * trained / layout.gpus
    else:
        optimizer = MOMENTS * _local(trained, learning.trained_experts(network), layout)
    host = 0.0
    if layout.offload:
        host = optimizer + 4 * trained / layout.gpus  # gradients beside master and moments
        optimizer = 0.0

    spread = layout.expert_parallel > 1
    kept = activations(network, learning, e, layout.checkpointing, spread)
    tokens = seq_len * layout.micro_batch
    vocab = network.shape.language.vocab_size
    labels = min(tokens, max(1, LOGITS_AT_ONCE // vocab))
    logits = labels * vocab * (4 + 2 * e)
    pictures = tokens * kept.per_visual_token
    if not learning.uses_vision:
        pictures = 0
    words = labels * kept.per_label + logits
    worst_is_text = words >= pictures
    copies = copied(network, learning, layout) if e == 2 and not zero else 0.0
    if copies and layout.checkpointing:
        # Autocast has dropped its copies before the backward pass makes a layer whole again and the
        # logits' gradient in the type of the products: only what exceeds those adds to the peak.
        learns = learning.learns("language")
        later: float = tokens * decoder_layer_bytes(network, e, learns, spread)
        if worst_is_text:
            later += labels * vocab * e
        copies = max(copies - later, min(copies, 2.0 * network.largest_block))
    return Memory(
        weights=round(weights),
        copies=round(copies),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(
            tokens * kept.per_token + (labels * kept.per_label if worst_is_text else pictures)
        ),
        logits=logits if worst_is_text else 0,
        gathered=round(gathered),
        host=round(host),
    )


def copied(network: Network, learning: Learning, layout: Layout) -> float:
    """Bytes of bfloat16 weights that autocast makes where a gradient passes.

    All of them wait for the backward pass. With checkpointing autocast still keeps those of weights
    that learn to the end of the forward pass; frozen ones and experts, which are not autocast's,
    go with their layer.
    """
    passing = [part for part in PARTS if learning.passes(part)]
    if not layout.checkpointing:
        experts = network.counted.experts if "language" in passing else 0
        return 2 * _local(sum(network.params(part) for part in passing), experts, layout)
    kept = learning.trained(network) - learning.trained_experts(network)
    return 2.0 * (kept + network.largest_block)


def _local(params: int, experts: int, layout: Layout) -> float:
    """Parameters of which this rank holds a copy when nothing else is sharded."""
    return params - experts + experts / layout.expert_parallel


def _check(network: Network, layout: Layout) -> None:
    moe = network.shape.language.moe
    if layout.offload and layout.parallel == "ddp":
        raise ValueError(
            "--offload needs --parallel zero1, zero2 or zero3: ddp keeps all on the GPU"
        )
    degree = layout.expert_parallel
    if degree > 1 and moe is None:
        raise ValueError(f"expert parallel {degree}: the recipe's model has no experts")
    if degree > 1 and layout.parallel != "ddp":
        raise ValueError(
            f"expert parallel {degree} goes with ddp: {layout.parallel} shares the experts' state "
            "already, in slices over all GPUs"
        )
    if degree > 1 and moe is not None and (moe.num_experts % degree or layout.gpus % degree):
        raise ValueError(
            f"expert parallel {degree} must divide the {moe.num_experts} experts and the "
            f"{layout.gpus} GPUs"
        )
