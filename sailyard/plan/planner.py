"""A plan: per stage a layout that fits, the days it takes and what it costs.

`make_plan` is a function of its arguments alone; its result is the JSON of `sailyard plan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sailyard.pipeline import build_pipeline
from sailyard.plan.hardware import Gpu
from sailyard.plan.memory import PARALLEL, Layout, Memory, Parallel, memory_of
from sailyard.plan.network import Counted, Network
from sailyard.plan.work import (
    PAPER_TOKENS,
    PAPER_TOTAL,
    Assumptions,
    Work,
    not_planned,
    planned_work,
)
from sailyard.recipe import Recipe, TrainRecipe

SECONDS_PER_DAY = 86_400
MAX_GPUS = 4096
KEPT_CHECKPOINTS = 2  # sailyard.stage.checkpoints

# Cheapest first: sharding optimizer and gradients costs no more traffic than plain data
# parallelism (ZeRO paper, section 7), ZeRO-3 half as much again, recomputation a forward pass, and
# offload waits for the host's memory at every step.
LADDER: tuple[tuple[Parallel, bool, bool], ...] = (
    ("ddp", False, False),
    ("zero1", False, False),
    ("zero2", False, False),
    ("zero3", False, False),
    ("ddp", False, True),
    ("zero1", False, True),
    ("zero2", False, True),
    ("zero3", False, True),
    ("zero2", True, False),
    ("zero2", True, True),
    ("zero3", True, True),
)

MFU_BANDS = (
    (1e9, 0.20, "15-25 % below 1B"),
    (math.inf, 0.30, "25-40 % from 1B, packed multimodal rows being short of the best"),
)
MFU_EXPERTS = (0.15, "10-20 % for a mixture of experts")
"""Middle of the bands that published runs on H100 and A100 reach (docs/plan.md lists them)."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose; None lets the planner choose.

    Attributes:
        mfu: model FLOPs utilisation of a step without recomputation.
        price: US dollars per GPU-hour.
        rollout_share: of an RL stage's time that generation takes.
        sample_bytes: of a stored sample.
    """

    gpus: int
    gpu: Gpu
    parallel: Parallel | None = None
    offload: bool | None = None
    checkpointing: bool | None = None
    expert_parallel: int = 1
    mfu: float | None = None
    price: float = 2.5
    rollout_share: float = 0.8
    sample_bytes: int = 150_000
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus is {self.gpus}: a plan needs at least one")
        if self.parallel is not None and self.parallel not in PARALLEL:
            raise ValueError(f"--parallel {self.parallel!r}: use one of {', '.join(PARALLEL)}")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu is {self.mfu:g}: it is a share, above 0 and at most 1")
        if self.price < 0:
            raise ValueError(f"--price is {self.price:g}: it must not be negative")
        if not 0 <= self.rollout_share < 1:
            raise ValueError(f"--rollout-share is {self.rollout_share:g}: it lies in [0, 1)")
        if self.expert_parallel < 1:
            raise ValueError(f"--expert-parallel is {self.expert_parallel}: 1 means none")


def default_mfu(network: Network) -> tuple[float, str]:
    """The utilisation assumed for a network, and why."""
    if network.shape.language.moe is not None:
        return MFU_EXPERTS
    params = network.counted.language
    return next((mfu, why) for below, mfu, why in MFU_BANDS if params < below)


def make_plan(recipe: Recipe, counted: Counted, options: Options) -> dict[str, Any]:
    """The whole plan, JSON-able; docs/plan.md explains its keys.

    Raises:
        ValueError: options that contradict each other or the recipe.
    """
    network = Network(recipe.model, counted)
    pipeline = build_pipeline(recipe)
    mfu, why = default_mfu(network)
    if options.mfu is not None:
        mfu, why = options.mfu, "as given"
    works = list(planned_work(recipe, network, pipeline, options.assumed))
    stages = [_stage(work, network, options, mfu) for work in works]
    return {
        "recipe": recipe.name,
        "gpus": options.gpus,
        "gpu": {**asdict(options.gpu), "usable_bytes": options.gpu.usable_bytes},
        "parameters": {
            **{part: network.params(part) for part in ("vision", "adapter", "language")},
            "total": network.total,
            "active_per_token": counted.active_without_embeddings,
        },
        "stages": stages,
        "totals": _totals(stages),
        "paper": _paper(works),
        "not_planned": not_planned(recipe, pipeline),
        "assumptions": {
            **asdict(options.assumed),
            "mfu": mfu,
            "mfu_reason": why,
            "price_per_gpu_hour": options.price,
            "price_reason": "an assumption, no offer: give your own with --price",
            "rollout_share": options.rollout_share,
            "sample_bytes": options.sample_bytes,
            "optimizer": "AdamW everywhere; muon keeps less",
            "attention": "keeps no scores (flash, or torch's own of that kind)",
            "rollouts": "their cache is not counted: it takes the place of activations",
        },
    }


def _stage(work: Work, network: Network, options: Options, mfu: float) -> dict[str, Any]:
    layout = choose_layout(work, network, options)
    memory = _memory(work, network, layout)
    fits = memory.total <= options.gpu.usable_bytes
    executed = work.flops + (work.recompute if layout.checkpointing else 0.0)
    # More ranks than rows in a step have nothing to do.
    rows = layout.micro_batch * options.gpus
    accumulation = max(math.ceil(work.batch_size / rows), 1)
    busy = min(work.batch_size / (accumulation * rows), 1.0)
    training = executed / (options.gpu.peak_flops * mfu * options.gpus * busy)
    rollout = 0.0
    if work.rollout_tokens:
        rollout = training * options.rollout_share / (1 - options.rollout_share)
    days = (training + rollout) / SECONDS_PER_DAY
    hours = days * 24 * options.gpus
    return {
        "stage": work.stage,
        "trainable": ["routers"] if work.learning.routers_only else sorted(work.learning.parts),
        "tokens": work.tokens,
        "tokens_basis": work.basis,
        "assumed": work.assumed,
        "rollout_tokens": work.rollout_tokens,
        "in_paper": work.in_paper,
        "steps": work.steps,
        "flops": work.flops,
        "recompute_flops": executed - work.flops,
        "rollout_flops": work.rollout_flops,
        "layout": {**asdict(layout), "words": layout.words, "accumulation": accumulation},
        "recipe_layout": _recipe_layout(work, network, options),
        "busy_share": busy,
        "memory": {
            **asdict(memory),
            "total": memory.total,
            "activations_without_checkpointing": _activations(work, network, layout, False),
            "activations_with_checkpointing": _activations(work, network, layout, True),
        },
        "fits": fits,
        "would_fit": None if fits else smallest_change(work, network, layout, options),
        "days": days,
        "gpu_hours": hours,
        "cost": hours * options.price,
        **_storage(work, network, options),
    }


def choose_layout(work: Work, network: Network, options: Options) -> Layout:
    """The cheapest rung of the ladder that fits and agrees with the options; else the leanest."""
    rungs = list(_rungs(work, options))
    if not rungs:
        return Layout(
            options.parallel or "ddp",
            bool(options.offload),
            bool(options.checkpointing),
            work.micro_batch,
            options.gpus,
            _degree(work, options),
        )
    for layout in rungs:
        if _memory(work, network, layout).total <= options.gpu.usable_bytes:
            return layout
    return min(rungs, key=lambda layout: _memory(work, network, layout).total)


def smallest_change(
    work: Work, network: Network, layout: Layout, options: Options
) -> dict[str, Any] | None:
    """The layout nearest to this one that fits: a rung, then fewer rows, then more GPUs.

    None: nothing up to 4,096 GPUs.
    """
    free = replace(options, parallel=None, offload=None, checkpointing=None, expert_parallel=1)
    for change in _changes(work, layout, free):
        memory = _memory(work, network, change)
        if memory.total <= options.gpu.usable_bytes:
            words = [change.words] if change.words != layout.words else []
            if change.micro_batch != layout.micro_batch:
                words.append(f"micro batch {change.micro_batch}")
            if change.gpus != layout.gpus:
                words.append(f"{change.gpus} GPUs")
            return {**asdict(change), "words": ", ".join(words), "total": memory.total}
    return None


def _changes(work: Work, layout: Layout, free: Options) -> Iterator[Layout]:
    # One thing at a time first.
    yield from (
        rung
        for rung in _rungs(work, free)
        if (rung.parallel != layout.parallel)
        + (rung.offload != layout.offload)
        + (rung.checkpointing != layout.checkpointing)
        == 1
    )
    yield from _rungs(work, free)
    micro = layout.micro_batch
    while micro > 1:
        micro //= 2
        yield replace(layout, micro_batch=micro)
        yield from _rungs(replace(work, micro_batch=micro), free)
    gpus = layout.gpus
    while gpus < MAX_GPUS:
        gpus *= 2
        yield from _rungs(replace(work, micro_batch=1), replace(free, gpus=gpus))


def _rungs(work: Work, options: Options) -> Iterator[Layout]:
    degree = _degree(work, options)
    for parallel, offload, checkpointing in LADDER:
        # One process is plain torch, and so are spread experts; other ranks are DeepSpeed's.
        odd = (options.gpus == 1 or degree > 1) != (parallel == "ddp")
        if odd and (degree > 1 or (options.parallel is None and not offload)):
            continue
        if (
            (options.parallel in (None, parallel))
            and (options.offload in (None, offload))
            and (options.checkpointing in (None, checkpointing))
        ):
            yield Layout(
                parallel,
                offload,
                checkpointing,
                work.micro_batch,
                options.gpus,
                degree,
            )


def _degree(work: Work, options: Options) -> int:
    """Experts are spread in supervised stages only: RL's ranks generate each at its own pace."""
    return options.expert_parallel if isinstance(work.section, TrainRecipe) else 1


def _recipe_layout(work: Work, network: Network, options: Options) -> dict[str, Any] | None:
    """What the recipe itself declares, and whether that fits; None where it declares nothing."""
    section = work.section
    if not isinstance(section, TrainRecipe):
        return None
    alone = options.gpus == 1 and not section.offload  # plain torch, whatever the recipe says
    layout = Layout(
        "ddp" if alone else section.parallel,
        section.offload,
        section.activation_checkpointing,
        work.micro_batch,
        options.gpus,
        1 if alone else section.expert_parallel,
    )
    total = _memory(work, network, layout).total
    fits = total <= options.gpu.usable_bytes
    return {**asdict(layout), "words": layout.words, "total": total, "fits": fits}


def _memory(work: Work, network: Network, layout: Layout) -> Memory:
    return memory_of(network, work.learning, layout, work.seq_len, e=work.value_bytes)


def _activations(work: Work, network: Network, layout: Layout, checkpointing: bool) -> int:
    return _memory(work, network, replace(layout, checkpointing=checkpointing)).activations


def _storage(work: Work, network: Network, options: Options) -> dict[str, Any]:
    """Bytes in the store: data, checkpoints under way, and what a stage leaves.

    A checkpoint holds weights and both moments of what learns, in float32; of a later arm the
    frozen weights, too, which nothing else in the store has (training/loop.py).
    """
    trained = work.learning.trained(network)
    checkpoint = 12 * trained + (4 * (network.total - trained) if work.later_arm else 0)
    saves = max(work.steps - 1, 0) // work.checkpoint_every
    output = 4 * (network.total + network.counted.tied)
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoints": saves,
        "checkpoint_traffic_bytes": saves * checkpoint + output,
        "checkpoint_storage_bytes": min(saves, KEPT_CHECKPOINTS) * checkpoint + output,
        "data_bytes": work.samples * options.sample_bytes,
    }


def _totals(stages: list[dict[str, Any]]) -> dict[str, Any]:
    def total(key: str) -> Any:
        return sum(stage[key] for stage in stages)

    return {
        "tokens": total("tokens"),
        "rollout_tokens": total("rollout_tokens"),
        "flops": total("flops"),
        "recompute_flops": total("recompute_flops"),
        "rollout_flops": total("rollout_flops"),
        "days": total("days"),
        "gpu_hours": total("gpu_hours"),
        "cost": total("cost"),
        "data_bytes": total("data_bytes"),
        "checkpoint_traffic_bytes": total("checkpoint_traffic_bytes"),
        # Results stay; checkpoints of a stage go when it has finished.
        "output_bytes": sum(
            s["checkpoint_storage_bytes"]
            - min(s["checkpoints"], KEPT_CHECKPOINTS) * s["checkpoint_bytes"]
            for s in stages
        ),
        "largest_checkpoints_bytes": max(
            (min(s["checkpoints"], KEPT_CHECKPOINTS) * s["checkpoint_bytes"] for s in stages),
            default=0,
        ),
        "fits": all(stage["fits"] for stage in stages),
    }


def _paper(works: Iterable[Work]) -> dict[str, Any]:
    """Tokens beside paper Tables 3 and 4, and what our pipeline trains beyond them."""
    ours: dict[str, float] = dict.fromkeys(PAPER_TOKENS, 0.0)
    beyond = 0.0
    for work in works:
        group = work.stage.split(".")[0]
        key = group if group == "alignment" else work.stage
        if work.in_paper and key in ours:
            ours[key] += work.tokens
        else:
            beyond += work.tokens
    return {
        "stages": [
            {"stage": key, "tokens": ours[key], "paper_tokens": tokens}
            for key, tokens in PAPER_TOKENS.items()
        ],
        "tokens": sum(ours.values()),
        "paper_tokens": PAPER_TOTAL,
        "ratio": sum(ours.values()) / PAPER_TOTAL,
        "beyond_paper_tokens": beyond,
    }
