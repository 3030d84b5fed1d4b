"""Packing against padding: `python -m benchmarks.packing --json`.

Two questions, on the mixes of `benchmarks.mix`:

1. How full are the rows and how fast is the packer? The stream's own rule, beside TRL's packing
   (best-fit-decreasing, `pip install --no-deps trl datasets dill multiprocess xxhash`) and plain
   first-fit in arrival order. TRL packs a stored set, a thousand samples at a time; the stream
   sees `LOOK_AHEAD` samples ahead. All get the same samples.
2. What is that worth? Training steps (forward and backward, fp32, CPU) of batches that may hold
   `--rows` rows of `seq_len` token slots at most: the memory of every arm is the same. The more
   rows, the more there is to pad to. Ways to fill them:

   - packed: that many rows by the stream's rule.
   - padded: a fixed number of consecutive samples, padded to the longest among them, attention by
     torch's sdpa with a padding mask: what a trainer that pads does by default. The number is what
     its batch size must be for the mix's longest sample to fit beside its equals: more would run
     out of memory on the batch in which they meet.
   - padded, attention unpadded: the same, but attention never sees padding, as with flash kernels.
   - padded, token budget: attention unpadded, and consecutive samples while the longest times their
     number fits, so that batches of short samples hold more of them. Fewer trainers do this; it
     needs a loss that is normalised over unequal batches.

   The network is 2B's decoder with every width divided by `SHRINK` and so are the mix's lengths, so
   that projections, attention and output layer cost the shares that they cost in 2B; only text has
   labels. The tower is left out: it sees no padding in any arm. The arms alternate; a speed is all
   tokens over all seconds, because the arms' steps differ in length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.mix import LONGCOT, MULTITASK, Kind, describe, draw
from model.attention import BACKEND
from model.checkpoint import build_language
from model.config import language_config_of
from model.language import IGNORE, language_forward
from sailyard.recipe import load_recipe
from training.packing import fill_row

LOOK_AHEAD = 256
SHRINK = 8
SETTINGS: dict[str, tuple[Sequence[Kind], int]] = {
    "multitask": (MULTITASK, 8192),
    "longcot": (LONGCOT, 20_480),
}

Rows = list[list[int]]
"""Lengths of the samples in each row."""


def stream_rows(lengths: Sequence[int], seq_len: int) -> Rows:
    """The stream's rule over a look-ahead buffer; the last, unfilled buffer is not counted."""
    buffer = list(lengths[:LOOK_AHEAD])
    coming = iter(lengths[LOOK_AHEAD:])
    rows: Rows = []
    while len(buffer) == LOOK_AHEAD:
        chosen = fill_row(buffer, seq_len)
        rows.append([buffer[i] for i in chosen])
        taken = set(chosen)
        buffer = [length for i, length in enumerate(buffer) if i not in taken]
        buffer.extend(length for length, _ in zip(coming, chosen, strict=False))
    return rows


def first_fit_rows(lengths: Sequence[int], seq_len: int) -> Rows:
    """First-fit in arrival order: the first open row with room, else a new one."""
    rows: Rows = []
    space: list[int] = []
    for length in lengths:
        for i, free in enumerate(space):
            if length <= free:
                rows[i].append(length)
                space[i] -= length
                break
        else:
            rows.append([length])
            space.append(seq_len - length)
    return rows


def trl_rows(lengths: Sequence[int], seq_len: int) -> tuple[Rows, float]:
    """TRL's own `pack_dataset`, strategy "bfd", and the seconds it took.

    Raises:
        ModuleNotFoundError: trl or datasets is not installed.
    """
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    started = time.perf_counter()
    packed = pack_dataset(data, seq_len, strategy="bfd")
    seconds = time.perf_counter() - started
    return [list(row) for row in packed["seq_lengths"]], seconds


def compare_packers(lengths: Sequence[int], seq_len: int) -> dict[str, Any]:
    """Fill, and samples per second of the packing alone."""
    found: dict[str, Any] = {}
    for name, pack in (("sailyard stream", stream_rows), ("first-fit", first_fit_rows)):
        started = time.perf_counter()
        rows = pack(lengths, seq_len)
        found[name] = _packing(rows, seq_len, time.perf_counter() - started)
    try:
        rows, seconds = trl_rows(lengths, seq_len)
    except ModuleNotFoundError as error:
        found["trl bfd"] = {"skipped": f"{error.name} is not installed"}
    else:
        found["trl bfd"] = _packing(rows, seq_len, seconds)
    return found


def _packing(rows: Rows, seq_len: int, seconds: float) -> dict[str, float]:
    tokens = sum(map(sum, rows))
    samples = sum(map(len, rows))
    return {
        "fill": tokens / (len(rows) * seq_len),
        "rows": len(rows),
        "samples_per_second": samples / seconds,
    }


def fixed_batches(lengths: Sequence[int], slots: int, longest: int) -> Rows:
    """Consecutive samples, as many in every batch as fit when all are as long as `longest`."""
    size = max(slots // longest, 1)
    return [list(lengths[i : i + size]) for i in range(0, len(lengths) - size + 1, size)]


def budget_batches(lengths: Sequence[int], slots: int) -> Rows:
    """Consecutive samples, as many as fit when all are padded to the longest of the batch."""
    batches: Rows = []
    current: list[int] = []
    for length in lengths:
        if current and max(*current, length) * (len(current) + 1) > slots:
            batches.append(current)
            current = []
        current.append(length)
    return batches


def network(backend: str) -> PreTrainedModel:
    """2B's decoder, widths divided by SHRINK; four layers, and the output layer's share kept."""
    full = load_recipe("2b").model.language
    layers = 4
    section = full.model_copy(
        update={
            "num_layers": layers,
            "hidden_size": full.hidden_size // SHRINK,
            "intermediate_size": full.intermediate_size // SHRINK,
            # Heads as wide as CPU kernels like them; their number times their width is 2B's / 8.
            "num_heads": full.num_heads // 4,
            "num_kv_heads": full.num_kv_heads // 4,
            "head_dim": full.head_dim * 4 // SHRINK,
            "vocab_size": full.vocab_size // SHRINK * layers // full.num_layers,
        }
    )
    torch.manual_seed(0)
    model = build_language(language_config_of(section)).train()
    model.set_attn_implementation(backend)
    return model


def measure_training(
    lengths: Sequence[int], seq_len: int, num_rows: int, steps: int, text_share: float
) -> dict[str, Any]:
    """Tokens per second of training steps, packed and padded, in turns.

    Args:
        num_rows: of seq_len, which a batch of any arm may hold.
        text_share: of the tokens, which have labels.
    """
    torch.set_num_threads(2)
    small = [max(length // SHRINK, 2) for length in lengths]
    width = seq_len // SHRINK
    slots = num_rows * width
    rows = stream_rows(small, width)
    fixed = [_padded(batch) for batch in fixed_batches(small, slots, max(small))]
    arms: dict[str, list[torch.Tensor]] = {
        "packed": [_packed(rows[i : i + num_rows], width) for i in range(0, len(rows), num_rows)],
        "padded": fixed,
        "padded, attention unpadded": fixed,
        "padded, token budget": [_padded(batch) for batch in budget_batches(small, slots)],
    }
    models = {arm: network("sdpa" if arm == "padded" else BACKEND) for arm in arms}

    def seconds(model: PreTrainedModel, segments: torch.Tensor) -> float:
        ids = torch.randint(0, model.config.vocab_size, segments.shape)
        labelled = (segments > 0) & (torch.rand(segments.shape) < text_share)
        started = time.perf_counter()
        output = language_forward(
            model,
            model.get_input_embeddings()(ids),
            attention_mask=segments,
            labels=torch.where(labelled, ids, IGNORE),
        )
        assert output.loss is not None
        output.loss.backward()
        model.zero_grad()
        return time.perf_counter() - started

    tokens, spent = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
    for number in range(-2, steps):  # the first ones warm up
        for arm, batches in arms.items():
            batch = batches[number % len(batches)]
            took = seconds(models[arm], batch)
            if number >= 0:
                tokens[arm] += int((batch > 0).sum())
                spent[arm] += took
    speeds = {arm: tokens[arm] / spent[arm] for arm in arms}
    return {
        "slots": slots,
        "steps": steps,
        "batch_size_padded": fixed[0].shape[0],
        "fill": {
            arm: sum(int((b > 0).sum()) for b in batches) / sum(b.numel() for b in batches)
            for arm, batches in arms.items()
        },
        # How the choice of num_rows bears on it: fill of padded batches of so many samples.
        "fill_padded_by_batch_size": {
            size: sum(sum(b) for b in batches) / sum(len(b) * max(b) for b in batches)
            for size in (1, 2, 4, 8, 16, 32)
            for batches in [fixed_batches(small, size, 1)]
        },
        "slots_used": {
            arm: sum(b.numel() for b in batches) / (slots * len(batches))
            for arm, batches in arms.items()
        },
        "tokens_per_second": speeds,
        "speedup": {arm: speeds["packed"] / speeds[arm] for arm in arms if arm != "packed"},
    }


def _packed(rows: Rows, width: int) -> torch.Tensor:
    """[rows, width] segment ids."""
    segments = np.zeros((len(rows), width), dtype=np.int64)
    for line, row in zip(segments, rows, strict=True):
        line[: sum(row)] = np.repeat(np.arange(1, len(row) + 1), row)
    return torch.from_numpy(segments)


def _padded(batch: Sequence[int]) -> torch.Tensor:
    """[samples, longest] 1 where a token is."""
    positions = np.arange(max(batch))
    return torch.from_numpy((positions < np.array(batch)[:, None]).astype(np.int64))


def main() -> None:
    """Run both mixes; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mix", choices=[*SETTINGS], nargs="+", default=[*SETTINGS])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.mix:
        kinds, seq_len = SETTINGS[name]
        drawn = draw(kinds, arguments.samples, any_resolution=False)
        lengths = [sample.tokens for sample in drawn if sample.tokens <= seq_len]
        mix = describe(drawn)
        found[name] = {
            "seq_len": seq_len,
            "mix": mix,
            "too_long": len(drawn) - len(lengths),
            "packers": compare_packers(lengths, seq_len),
            "training": measure_training(
                lengths, seq_len, arguments.rows, arguments.steps, 1.0 - float(mix["visual_share"])
            ),
        }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, result in found.items():
        training = result["training"]
        print(f"{name}, rows of {result['seq_len']}")
        for arm, factor in training["speedup"].items():
            fill, used = training["fill"][arm], training["slots_used"][arm]
            print(f"  {factor:.2f}x {arm} (fill {fill:.3f} of {used:.3f} of the slots)")
        for packer, figures in result["packers"].items():
            if "skipped" in figures:
                print(f"  {packer:16} {figures['skipped']}")
            else:
                print(
                    f"  {packer:16} fill {figures['fill']:.4f}, "
                    f"{figures['samples_per_second']:,.0f} samples/s"
                )


if __name__ == "__main__":
    main()
