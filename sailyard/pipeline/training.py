"""Stages that train: bootstrap, alignment, pretraining, post-training and its policy data."""

from __future__ import annotations

from collections.abc import Mapping

from sailyard.pipeline.graph import Stage


def bootstrap_stages(gpus: int) -> list[Stage]:
    return [
        Stage(
            "bootstrap.language",
            "training.bootstrap:run_language",
            4,
            inputs={"text": "curation.text/text"},
            outputs=("language",),
            sections=("bootstrap.language", "model"),
            doc="Tokenizer and language model: downloaded when the recipe names one, else trained.",
            needs_torch=True,
            resumable=True,
            distributed=True,
            gpus=gpus,
        ),
        Stage(
            "bootstrap.vision",
            "training.bootstrap:run_vision",
            4,
            inputs={
                "language": "bootstrap.language/language",
                "reference": "curation.ingest/reference",
                "text": "curation.text/text",
            },
            outputs=("vision", "captioner"),
            sections=("bootstrap.vision", "bootstrap.adapter", "bootstrap.tower", "model"),
            doc="Vision tower, and the predecessor model that judges and validates data.",
            needs_torch=True,
            resumable=True,
            gpus=gpus,
        ),
    ]


def _training_stage(
    name: str,
    entry: str,
    inputs: Mapping[str, str],
    gpus: int,
    doc: str,
    sections: tuple[str, ...] = (),
) -> Stage:
    """A stage that trains a checkpoint; its recipe section is named like it unless said."""
    return Stage(
        name,
        entry,
        3,
        inputs=inputs,
        outputs=("checkpoint",),
        sections=(*(sections or (name,)), "model"),
        doc=doc,
        needs_torch=True,
        resumable=True,
        distributed=True,
        gpus=gpus,
    )


def alignment_stages(gpus: int) -> list[Stage]:
    entry = "training.alignment:run"
    # One set of images for every measurement, or the three stages' distances could not be compared.
    heldout = {"heldout": "curation.heldout/heldout"}
    return [
        _training_stage(
            "alignment.warmup",
            entry,
            {
                "vision": "bootstrap.vision/vision",
                "language": "bootstrap.language/language",
                "mix": "curation.mix_warmup/mix",
                **heldout,
            },
            gpus,
            "Teach the adapter alone to speak the language model's embedding space.",
            ("alignment.warmup", "alignment.metrics"),
        ),
        _training_stage(
            "alignment.fine_grained",
            entry,
            {
                "checkpoint": "alignment.warmup/checkpoint",
                "mix": "curation.mix_fine_grained/mix",
                **heldout,
            },
            gpus,
            "Vision tower and adapter learn detail.",
            ("alignment.fine_grained", "alignment.metrics"),
        ),
        _training_stage(
            "alignment.world_knowledge",
            entry,
            {
                "checkpoint": "alignment.fine_grained/checkpoint",
                "mix": "curation.mix_world_knowledge/mix",
                **heldout,
            },
            gpus,
            "All parts learn together; the resulting tower goes on to pretraining.",
            ("alignment.world_knowledge", "alignment.metrics"),
        ),
    ]


def pretraining_stages(gpus: int, moe: bool) -> list[Stage]:
    language = "bootstrap.language/language"
    stages = []
    if moe:
        stages.append(
            Stage(
                "pretraining.expert_calibration",
                "training.calibration:run",
                2,
                inputs={
                    "language": language,
                    "text": "curation.text/text",
                    # Still with the decoder of bootstrap.language, frozen so far.
                    "checkpoint": "alignment.fine_grained/checkpoint",
                    "multimodal": "curation.mix_fine_grained/mix",
                },
                outputs=("language",),
                sections=("pretraining.expert_calibration", "model"),
                doc="Raise the entropy of expert activation before multimodal training.",
                needs_torch=True,
                resumable=True,
                gpus=gpus,
            )
        )
        language = "pretraining.expert_calibration/language"
    return [
        *stages,
        _training_stage(
            "pretraining.basic",
            "training.pretraining:run_basic",
            {
                "checkpoint": "alignment.world_knowledge/checkpoint",
                "language": language,
                "mix": "curation.mix_basic/mix",
            },
            gpus,
            "A fresh adapter joins the aligned tower and the language model, under AdaLRS.",
        ),
        _training_stage(
            "pretraining.multitask",
            "training.pretraining:run_multitask",
            {"checkpoint": "pretraining.basic/checkpoint", "mix": "curation.mix_multitask/mix"},
            gpus,
            "All parts on every task.",
        ),
    ]


def base_sft_stages(gpus: int) -> list[Stage]:
    instruction = {"instruction": "curation.instruction2/instruction"}
    video = {"video": "curation.video/video"}
    hard = {"charts": "curation.charts/charts", "longcot": "curation.longcot/longcot"}

    def base_sft(name: str, previous: str, data: Mapping[str, str], doc: str) -> Stage:
        return _training_stage(
            f"post_training.{name}",
            "training.sft:run_base",
            {"checkpoint": f"{previous}/checkpoint", **data},
            gpus,
            doc,
            # The sibling differs by its seed alone, which comes from its name.
            (f"post_training.{name.removesuffix('_sibling')}",),
        )

    third = "post_training.base_sft_3"
    return [
        base_sft(
            "base_sft_1",
            "pretraining.multitask",
            {"mix": "curation.mix_multitask/mix", "vqa": "curation.vqa/vqa"},
            "First injection: world knowledge.",
        ),
        base_sft(
            "base_sft_2",
            "post_training.base_sft_1",
            instruction,
            "Second injection: validated instructions.",
        ),
        base_sft(
            "base_sft_3",
            "post_training.base_sft_2",
            hard | instruction,
            "Third injection: the hard subset.",
        ),
        base_sft(
            "base_sft_4", third, video | instruction, "Fourth injection: video and images, 1:1."
        ),
        base_sft(
            "base_sft_4_sibling",
            third,
            video | instruction,
            "The fourth injection in another order: the soup's second ingredient.",
        ),
    ]


def soup_stages(inference: int, greedy: bool) -> list[Stage]:
    heldout = {"heldout": "curation.heldout/heldout"} if greedy else {}
    return [
        Stage(
            "post_training.soup",
            "training.soup:run",
            2,
            inputs={
                "a": "post_training.base_sft_4/checkpoint",
                "b": "post_training.base_sft_4_sibling/checkpoint",
                **heldout,
            },
            outputs=("checkpoint",),
            sections=("post_training.soup", "model"),
            doc="Average of homogeneous checkpoints: of all, or greedily of those that help.",
            needs_torch=True,
            gpus=inference if greedy else 0,
        ),
    ]


def thinking_stages(training: int, inference: int) -> list[Stage]:
    rl_pool = "curation.ingest/rl_pool"
    longcot_sft = "post_training.longcot_sft/checkpoint"
    verifiable_rl = "post_training.verifiable_rl/checkpoint"
    fusion_sft = "post_training.think_fusion_sft/checkpoint"

    def policy_data(
        name: str, entry: str, inputs: Mapping[str, str], output: str, doc: str
    ) -> Stage:
        return Stage(
            name,
            entry,
            2,
            inputs=inputs,
            outputs=(output,),
            sections=(name, "model"),
            doc=doc,
            needs_torch=True,
            spreads=True,
            gpus=inference,
        )

    return [
        _training_stage(
            "post_training.longcot_sft",
            "training.sft:run_longcot",
            {"checkpoint": "post_training.soup/checkpoint", "longcot": "curation.longcot/longcot"},
            training,
            "Learn to think in steps and to box the answer.",
        ),
        policy_data(
            "curation.rl_data",
            "curation.rl_data:run",
            {"checkpoint": longcot_sft, "rl_pool": rl_pool},
            "prompts",
            "Prompts the current policy finds challenging yet solvable (pass@4).",
        ),
        _training_stage(
            "post_training.verifiable_rl",
            "training.rl.stage:run_verifiable",
            {"checkpoint": longcot_sft, "prompts": "curation.rl_data/prompts"},
            training,
            "Reinforcement on answers a rule can check: DAPO, or GSPO for experts.",
        ),
        policy_data(
            "curation.think_fusion",
            "curation.think_fusion:run",
            {
                "checkpoint": verifiable_rl,
                "prompts": rl_pool,
                "instruction": "curation.instruction2/instruction",
            },
            "fusion",
            "Direct answers beside thoughts rejection-sampled from the policy.",
        ),
        _training_stage(
            "post_training.think_fusion_sft",
            "training.sft:run_think_fusion",
            {"checkpoint": verifiable_rl, "fusion": "curation.think_fusion/fusion"},
            training,
            "One model that thinks when asked to and answers at once otherwise.",
        ),
        policy_data(
            "curation.mixed_rl_data",
            "curation.mixed_rl_data:run",
            {"checkpoint": fusion_sft, "rl_pool": rl_pool},
            "prompts",
            "Hard reasoning prompts beside general ones.",
        ),
        _training_stage(
            "post_training.mixed_rl",
            "training.rl.stage:run_mixed",
            {"checkpoint": fusion_sft, "prompts": "curation.mixed_rl_data/prompts"},
            training,
            "Reinforcement on answer, thought and format together.",
        ),
    ]
