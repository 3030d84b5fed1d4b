"""``sailyard plan``: memory, time and cost of a recipe, before anything is started."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from sailyard.cli.network import room
from sailyard.cli.output import byte_size, console, print_json, print_table


class ParallelChoice(StrEnum):
    """How a stage's state is spread over its GPUs."""

    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


def plan(
    recipe: Annotated[str, typer.Option(help="Preset name or path of a YAML file.")] = "8b",
    gpus: Annotated[int, typer.Option(help="GPUs of the run, one training process each.")] = 64,
    gpu: Annotated[str, typer.Option(help="a100, a100-40, h20, h100, h200 or b200.")] = "h100",
    parallel: Annotated[
        ParallelChoice | None, typer.Option(help="Default: the first that fits.")
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload/--no-offload", help="Optimizer in CPU memory.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations."),
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(help="Ranks that share one copy of the experts, with ddp.")
    ] = 1,
    mfu: Annotated[
        float | None,
        typer.Option(help="Model FLOPs utilisation. Default 0.30, 0.20 below 1B, experts 0.15."),
    ] = None,
    price: Annotated[float, typer.Option(help="Dollars per GPU-hour, an assumption.")] = 2.5,
    rollout_share: Annotated[
        float, typer.Option(help="Share of an RL stage's time that generation takes.")
    ] = 0.8,
    visual_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of tokens that come from images.")
    ] = 0.5,
    sample_bytes: Annotated[int, typer.Option(min=0, help="Size of a stored sample.")] = 150_000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe field, as a.b.c=value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run of the whole pipeline will take: memory, days, storage, cost."""
    from sailyard.plan.hardware import find_gpu
    from sailyard.plan.planner import Options, make_plan
    from sailyard.plan.work import Assumptions
    from sailyard.recipe import load_recipe

    options = Options(
        gpus=gpus,
        gpu=find_gpu(gpu),
        parallel=parallel.value if parallel else None,
        offload=offload,
        checkpointing=checkpointing,
        expert_parallel=expert_parallel,
        mfu=mfu,
        price=price,
        rollout_share=rollout_share,
        sample_bytes=sample_bytes,
        assumed=Assumptions(visual_share=visual_share),
    )
    loaded = load_recipe(recipe, overrides or [])
    counted = room("model.counting").count_recipe(loaded.model)
    found = make_plan(loaded, counted, options)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    title = f"{found['recipe']} on {found['gpus']} x {found['gpu']['name']}"
    stages = found["stages"]
    print_table(
        f"{title}: memory per GPU, {byte_size(found['gpu']['usable_bytes'])} usable",
        ("stage", "layout", "weights", "grads", "optimizer", "activations", "total", "fits"),
        [_memory_row(stage) for stage in stages],
    )
    print_table(
        f"{title}: work",
        ("stage", "trains", "tokens", "FLOPs", "days", "GPU-hours", "cost", "checkpoints"),
        [*[_work_row(stage) for stage in stages], _total_row(found["totals"])],
    )
    paper, totals, assumed = found["paper"], found["totals"], found["assumptions"]
    lines = [
        f"tokens: {_billions(paper['tokens'])} in the paper's stages, where it has "
        f"{_billions(paper['paper_tokens'])}; {_billions(paper['beyond_paper_tokens'])} beyond "
        "them (a control arm, a sibling for the soup, calibration, bootstrap)",
        f"storage: data {byte_size(totals['data_bytes'])}, results "
        f"{byte_size(totals['output_bytes'])}, checkpoints under way at most "
        f"{byte_size(totals['largest_checkpoints_bytes'])}; written in all "
        f"{byte_size(totals['checkpoint_traffic_bytes'])}",
        f"assumed: MFU {assumed['mfu']:g} ({assumed['mfu_reason']}), "
        f"${assumed['price_per_gpu_hour']:g} per GPU-hour ({assumed['price_reason']}), "
        f"{assumed['tokens_per_sample']:,} tokens per sample, visual share "
        f"{assumed['visual_share']:g}, generation {assumed['rollout_share']:.0%} of an RL stage "
        "(its cache not counted)",
        *dict.fromkeys(f"{s['stage']}: {s['tokens_basis']}" for s in stages if s["assumed"]),
    ]
    own = [s["stage"] for s in stages if s["recipe_layout"] and not s["recipe_layout"]["fits"]]
    if own:
        lines.append(
            "with the recipe's own parallel, offload and activation_checkpointing these do not fit "
            f"(set them as in the first table): {', '.join(dict.fromkeys(own))}"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_table("not planned", ("stage", "why"), list(found["not_planned"].items()))


def _memory_row(stage: dict[str, Any]) -> tuple[str, ...]:
    memory, change = stage["memory"], stage["would_fit"]
    fits = "yes"
    if not stage["fits"]:
        fits = f"no; would: {change['words']}" if change else "no, on no number of these GPUs"
    return (
        stage["stage"],
        stage["layout"]["words"],
        byte_size(memory["weights"] + memory["copies"] + memory["gathered"]),
        byte_size(memory["gradients"]),
        byte_size(memory["optimizer"]),
        byte_size(memory["activations"] + memory["logits"]),
        byte_size(memory["total"]),
        fits,
    )


def _work_row(stage: dict[str, Any]) -> tuple[str, ...]:
    return (
        stage["stage"],
        ", ".join(stage["trainable"]),
        _billions(stage["tokens"]),
        f"{stage['flops'] + stage['recompute_flops'] + stage['rollout_flops']:.2e}",
        f"{stage['days']:.2f}",
        f"{stage['gpu_hours']:,.0f}",
        f"${stage['cost']:,.0f}",
        f"{stage['checkpoints']} x {byte_size(stage['checkpoint_bytes'])}",
    )


def _total_row(totals: dict[str, Any]) -> tuple[str, ...]:
    return (
        "all",
        "",
        _billions(totals["tokens"]),
        f"{totals['flops'] + totals['recompute_flops'] + totals['rollout_flops']:.2e}",
        f"{totals['days']:.2f}",
        f"{totals['gpu_hours']:,.0f}",
        f"${totals['cost']:,.0f}",
        byte_size(totals["checkpoint_traffic_bytes"]),
    )


def _billions(tokens: float) -> str:
    return f"{tokens / 1e9:,.1f}B" if tokens >= 1e8 else f"{tokens / 1e6:,.1f}M"
