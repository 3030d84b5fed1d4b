"""Stages that make data: sources, judges and filters, mixtures."""

from __future__ import annotations

from sailyard.pipeline.graph import Stage


def source_stages() -> list[Stage]:
    return [
        Stage(
            "curation.ingest",
            "curation.ingest:run",
            7,
            outputs=("captions", "reference", "video", "instruction", "rl_pool", "quarantine"),
            sections=("world", "data", "model.vision"),
            doc="Render the small world, take user data in, quarantine what is broken.",
        ),
        Stage(
            "curation.heldout",
            "curation.heldout:run",
            3,
            outputs=("heldout",),
            sections=("world", "model.vision"),
            doc="Questions per skill on layouts that training never sees.",
        ),
        Stage(
            "curation.text",
            "curation.text:run",
            7,
            outputs=("text",),
            sections=("world",),
            doc="Pure text that grows and preserves the language model.",
        ),
    ]


def curation_stages(inference: int, training: int) -> list[Stage]:
    captioner = "bootstrap.vision/captioner"
    return [
        Stage(
            "curation.caption_scores",
            "curation.scores:run",
            2,
            inputs={"captions": "curation.ingest/captions"},
            outputs=("scores",),
            sections=("curation.caption_scores",),
            doc="A teacher scores VIR and ITA from 1 to 5 on a part of the captions.",
        ),
        Stage(
            "curation.judges",
            "training.judges:run",
            2,
            inputs={"scores": "curation.caption_scores/scores", "captioner": captioner},
            outputs=("judges",),
            sections=("curation.judges", "model"),
            doc="Train score and yes-or-no judges; measure precision and recall.",
            needs_torch=True,
            resumable=True,
            gpus=training,
        ),
        Stage(
            "curation.caption2",
            "curation.caption2:run",
            2,
            inputs={"captions": "curation.ingest/captions", "judges": "curation.judges/judges"},
            outputs=("captions", "dropped"),
            sections=("curation.caption2", "model"),
            doc="Judges score every caption; low scores and a 'No' are dropped, by reason.",
            needs_torch=True,
            spreads=True,
            gpus=inference,
        ),
        Stage(
            "curation.charts",
            "curation.charts:run",
            3,
            outputs=("charts",),
            sections=("curation.charts", "world", "model.vision"),
            doc="Charts drawn by code from real tables, with captions and questions.",
        ),
        Stage(
            "curation.vqa",
            "curation.vqa:run",
            5,
            inputs={"captions": "curation.caption2/captions"},
            outputs=("vqa",),
            sections=("curation.vqa",),
            doc="Questions and answers out of each caption.",
        ),
        Stage(
            "curation.video",
            "curation.video:run",
            2,
            inputs={"video": "curation.ingest/video"},
            outputs=("video",),
            sections=("curation.video",),
            doc="Keep video questions that are aligned, rich and hard enough.",
        ),
        Stage(
            "curation.instruction2",
            "curation.instruction:run",
            2,
            inputs={"instruction": "curation.ingest/instruction", "captioner": captioner},
            outputs=("instruction",),
            sections=("curation.instruction2", "model"),
            doc="Validate sources, sort into latent classes, draw evenly, annotate again.",
            needs_torch=True,
            gpus=inference,
        ),
        Stage(
            "curation.longcot",
            "curation.longcot:run",
            3,
            inputs={
                "rl_pool": "curation.ingest/rl_pool",
                "instruction": "curation.instruction2/instruction",
            },
            outputs=("longcot",),
            sections=("curation.longcot",),
            doc="Step-by-step solutions, filtered for length and overlap.",
        ),
    ]


def mix_stages() -> list[Stage]:
    captions = {"captions": "curation.caption2/captions"}
    charts = {"charts": "curation.charts/charts"}
    video = {"video": "curation.video/video"}
    questions = {
        "vqa": "curation.vqa/vqa",
        "instruction": "curation.instruction2/instruction",
        "text": "curation.text/text",
    }
    mixes = {
        "warmup": (captions, "Captions for the adapter's first alignment."),
        "fine_grained": (captions | video | charts, "Captions, printed text, charts and clips."),
        "world_knowledge": (captions | charts | questions, "Broad knowledge for all parts."),
        "basic": (captions | charts, "Basic pretraining: dataset-level balance."),
        "multitask": (captions | charts | video | questions, "Every task, n-gram balanced."),
    }
    return [
        Stage(
            f"curation.mix_{mix}",
            "curation.mix:run",
            2,
            inputs=inputs,
            outputs=("mix",),
            sections=(f"curation.mix.{mix}", "data"),
            doc=doc,
        )
        for mix, (inputs, doc) in mixes.items()
    ]
