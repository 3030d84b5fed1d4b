"""The data stages end to end on a small recipe: ingest, heldout, text, charts, vqa, video."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation import charts, heldout, ingest, text, video, vqa
from curation.oracle import VideoScore
from curation.video import thin, verdict
from curation.world.sources import raw_captions
from sailyard.recipe import load_recipe
from sailyard.recipe.data import VideoFilter
from sailyard.samples import SKILLS, Sample, read_samples, write_samples
from sailyard.stage.context import StageContext, local_context

SMALL = (
    "world.num_images=40", "world.num_reference=8", "world.num_videos=30", "world.num_digits=6",
    "world.num_words=6", "world.num_photos=4", "world.num_text=30", "world.num_charts=12",
    "world.num_instructions=30", "world.num_rl_prompts=20", "world.num_broken=10",
    "world.heldout_per_skill=2",
)  # fmt: skip


def context(tmp_path: Path, stage: str, *overrides: str, **inputs: Path) -> StageContext:
    return local_context(tmp_path, load_recipe("micro", [*SMALL, *overrides]), stage, inputs)


def shards(ctx: StageContext, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(ctx.output(name).glob("*.parquet"))]


def test_ingest_makes_every_output_and_quarantines_what_is_broken(tmp_path: Path) -> None:
    first = context(tmp_path / "a", "curation.ingest")
    ingest.run(first)
    summary = first.summary_values
    assert summary["num_samples"] == {
        "captions": 56, "reference": 18, "video": 30, "instruction": 30, "rl_pool": 20,
    }  # fmt: skip
    assert summary["num_quarantined"] == summary["num_broken_made"] == 10
    assert summary["num_broken_missed"] == 0
    lines = (first.output("quarantine") / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    assert all(r["reason"] and r["detail"] and r["name"] for r in rejected)
    counts = json.loads((first.output("quarantine") / "counts.json").read_text())
    assert counts == summary["quarantine"]
    pool = list(read_samples(first.output("rl_pool")))
    assert all({"answer", "check", "skill"} <= set(s.meta) for s in pool)
    assert all(s.messages[-1]["role"] == "user" for s in pool)
    again = context(tmp_path / "b", "curation.ingest")
    ingest.run(again)
    for name in summary["num_samples"]:
        assert shards(first, name) == shards(again, name)


def test_ingest_mixes_the_users_data_in(tmp_path: Path) -> None:
    folder = tmp_path / "My Photos!"
    folder.mkdir()
    for i in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
    (folder / "0.txt").write_text("a dark square")
    (folder / "1.json").write_text(json.dumps({"question": "How bright?", "answer": "Half."}))
    overrides = [f"data.path={json.dumps(str(folder))}", "world.num_broken=0"]
    ctx = context(tmp_path / "a", "curation.ingest", *overrides)
    ingest.run(ctx)
    assert ctx.summary_values["num_user"] == {"captions": 1, "instruction": 1}
    assert ctx.summary_values["quarantine"] == {"caption_missing": 1}
    mine = [s for s in read_samples(ctx.output("captions")) if s.source.startswith("user:")]
    assert [s.source for s in mine] == ["user:My-Photos"]
    assert mine[0].meta["caption"] == "a dark square"


def test_a_missing_data_path_is_named(tmp_path: Path) -> None:
    ctx = context(tmp_path / "a", "curation.ingest", "data.path=/no/such/place")
    with pytest.raises(ingest.DataNotFound, match="/no/such/place"):
        ingest.run(ctx)


def test_an_empty_world_is_a_world(tmp_path: Path) -> None:
    none = [f"world.num_{n}=0" for n in ("images", "reference", "videos", "digits", "words",
            "photos", "instructions", "rl_prompts", "broken")]  # fmt: skip
    ctx = context(tmp_path / "a", "curation.ingest", *none)
    ingest.run(ctx)
    assert set(ctx.summary_values["num_samples"].values()) == {0}
    assert list(read_samples(ctx.output("captions"))) == []


def test_heldout_text_and_charts(tmp_path: Path) -> None:
    for stage, run in (("heldout", heldout.run), ("text", text.run), ("charts", charts.run)):
        contexts = [context(tmp_path / f"{stage}{i}", f"curation.{stage}") for i in range(2)]
        for ctx in contexts:
            run(ctx)
        assert shards(contexts[0], stage) == shards(contexts[1], stage)
    held = context(tmp_path / "held", "curation.heldout")
    heldout.run(held)
    assert set(held.summary_values["majority_class"]) == set(SKILLS)
    assert held.summary_values["num_samples"] == 2 * len(SKILLS)
    drawn = context(tmp_path / "drawn", "curation.charts", "curation.charts.languages=[en, zh]")
    charts.run(drawn)
    languages = [s.meta["language"] for s in read_samples(drawn.output("charts"))]
    assert languages.count("en") == languages.count("zh") == 24


def test_vqa_measures_how_far_captions_can_be_trusted(tmp_path: Path) -> None:
    shares = []
    for name, bad_rate in (("clean", 0.0), ("bad", 0.9)):
        folder = tmp_path / name
        captions = raw_captions({"microworld": 60}, np.random.default_rng(1), 84, bad_rate)
        write_samples(folder, captions)
        ctx = context(tmp_path / f"{name}-run", "curation.vqa", captions=folder)
        vqa.run(ctx)
        shares.append(ctx.summary_values["correct"])
        for sample in read_samples(ctx.output("vqa")):
            assert sample.messages[0]["content"].startswith("<image>\n")
            assert len(sample.messages) == 2
    assert shares[0] > 0.9 > 0.6 > shares[1]


def test_free_captions_give_no_questions_and_are_counted(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "<image>\nDescribe."},
        {"role": "assistant", "content": "My dog on the beach, summer 2019"},
    ]
    write_samples(tmp_path / "in", [Sample("u", "user:me", "caption", messages, [b"png"])])
    ctx = context(tmp_path / "run", "curation.vqa", captions=tmp_path / "in")
    vqa.run(ctx)
    assert ctx.summary_values["unreadable_captions"] == 1
    assert ctx.summary_values["num_samples"] == 0
    assert ctx.summary_values["correct"] is None


@pytest.mark.parametrize(
    ("score", "fate"),
    [
        (None, "unscored"),
        (VideoScore(-1, -1, -1), "refused"),
        (VideoScore(4, 7, 8), "alignment"),
        (VideoScore(5, 4, 8), "richness"),
        (VideoScore(5, 5, 2), "difficulty"),
        (VideoScore(5, 5, 3), "kept"),
    ],
)
def test_video_thresholds_are_the_papers(score: VideoScore | None, fate: str) -> None:
    assert verdict(score, VideoFilter()) == fate


def test_long_clips_are_thinned_evenly() -> None:
    frames = "".join(f"Frame-{i + 1}: <image>\n" for i in range(5))
    sample = Sample("v", "video", "motion", [{"role": "user", "content": frames + "Which way?"}],
                    [bytes([i]) for i in range(5)], True)  # fmt: skip
    thinned = thin(sample, 3)
    assert thinned.images == [b"\0", b"\2", b"\4"]
    assert thinned.messages[0]["content"] == (
        "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nWhich way?"
    )


def test_video_drops_planted_faults(tmp_path: Path) -> None:
    ctx = context(tmp_path / "a", "curation.ingest", "world.num_videos=120")
    ingest.run(ctx)
    run = context(tmp_path / "b", "curation.video", video=ctx.output("video"))
    video.run(run)
    summary = run.summary_values
    assert sum(summary["funnel"].values()) == summary["num_raw"] == 120
    assert 0.6 < summary["num_kept"] / 120 < 0.9
    planted = summary["planted_faults"]
    assert planted["kept"]["none"] >= 0.95 * summary["num_kept"]
    assert planted["dropped"].keys() >= {"wrong_answer", "static", "blank"}
    kept = list(read_samples(run.output("video")))
    assert all(s.meta["alignment"] >= 5 and s.meta["difficulty"] >= 3 for s in kept)
