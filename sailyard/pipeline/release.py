"""Stages that judge and release what was trained."""

from __future__ import annotations

from sailyard.pipeline.graph import Stage

EVALUATED = (
    "pretraining.multitask",
    "post_training.base_sft_1",
    "post_training.base_sft_2",
    "post_training.base_sft_3",
    "post_training.base_sft_4",
    "post_training.base_sft_4_sibling",
    "post_training.soup",
    "post_training.longcot_sft",
    "post_training.verifiable_rl",
    "post_training.think_fusion_sft",
    "post_training.mixed_rl",
)
"""Stages whose checkpoints the suite compares; each is the input named by its last part."""


def evaluation_stages(gpus: int) -> list[Stage]:
    checkpoints = {name.split(".")[1]: f"{name}/checkpoint" for name in EVALUATED}
    return [
        Stage(
            "evaluation.suite",
            "evaluation.suite:run",
            2,
            inputs={"heldout": "curation.heldout/heldout", **checkpoints},
            outputs=("report",),
            sections=("evaluation.suite", "model"),
            doc="Held-out accuracy per skill of every checkpoint, beside the majority class.",
            needs_torch=True,
            gpus=gpus,
        )
    ]


def deployment_stages(gpus: int) -> list[Stage]:
    report = {"report": "evaluation.suite/report"}
    version = {"version": "deployment.register/version"}
    return [
        Stage(
            "deployment.register",
            "sailyard.deployment:run_register",
            1,
            inputs={"checkpoint": "post_training.mixed_rl/checkpoint", **report},
            outputs=("version",),
            sections=("deployment", "name"),
            doc="Enter the final checkpoint into the model registry.",
            restore="sailyard.deployment:restore_version",
        ),
        Stage(
            "deployment.gate",
            "sailyard.deployment:run_gate",
            1,
            inputs={**version, **report},
            outputs=("verdict",),
            sections=("deployment",),
            doc="Hold the version against the recipe's thresholds.",
        ),
        Stage(
            "deployment.promote",
            "sailyard.deployment:run_promote",
            1,
            inputs={**version, "verdict": "deployment.gate/verdict"},
            outputs=("promotion",),
            sections=("deployment",),
            doc="Point the serving alias at the version.",
            restore="sailyard.deployment:restore_promotion",
        ),
        Stage(
            "deployment.smoke_test",
            "serving.smoke:run",
            1,
            inputs={
                **version,
                "promotion": "deployment.promote/promotion",
                "heldout": "curation.heldout/heldout",
            },
            outputs=("answers",),
            sections=("deployment", "model"),
            doc="Serve the promoted version and ask it questions over HTTP.",
            needs_torch=True,
            gpus=gpus,
        ),
    ]
