"""The small world's sizes, user data, and how raw data become training mixes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sailyard.recipe.base import Section
from sailyard.recipe.training import TrainRecipe

ChartType = Literal["bar", "line", "pie", "scatter", "area", "histogram", "heatmap", "box"]


class WorldRecipe(Section):
    """Sizes of the small world, whose ground truth is known.

    The paper has no such world, so every number is our choice. Full-size recipes leave the
    pictures out (0) and bring data with `data.path`.
    """

    num_images: int = Field(0, ge=0)
    """MicroWorld image-caption pairs. Our choice."""

    num_reference: int = Field(0, ge=0)
    """Clean, densely annotated images that stand in for a predecessor's training data: they
    train the bootstrap captioner. Our choice."""

    num_videos: int = Field(0, ge=0)
    """Short clips with questions. Our choice."""

    num_digits: int = Field(0, ge=0)
    """Images with real handwritten digits. Our choice."""

    num_words: int = Field(0, ge=0)
    """Images with printed words. Our choice."""

    num_charts: int = Field(400_000, ge=0)
    """Charts drawn from real tables. Paper section 3.1.1: 400K generated."""

    num_photos: int = Field(0, ge=0)
    """Crops of real photographs. Our choice."""

    num_text: int = Field(0, ge=0)
    """Text-only samples. Our choice."""

    num_instructions: int = Field(0, ge=0)
    """Instruction samples over all their sources. Our choice."""

    num_rl_prompts: int = Field(0, ge=0)
    """Verifiable single questions that reinforcement stages draw from. Our choice."""

    num_broken: int = Field(0, ge=0)
    """Files broken on purpose (truncated, empty, a bomb, ...) that ingestion must set aside.
    Our choice."""

    bad_caption_rate: float = Field(0.18, ge=0, le=1)
    """Share of captions corrupted on purpose. Paper section 3.1.1: 15-20 % score below 3."""

    noisy_instruction_rate: float = Field(0.5, ge=0, le=1)
    """Share of wrong answers in the one instruction source that is noisy on purpose. Our
    choice."""

    heldout_per_skill: int = Field(100, ge=1)
    """Held-out questions per skill, on layouts that training never shows. Our choice."""


class DataRecipe(Section):
    """A user's own data, mixed in at ingestion."""

    path: str | None = None
    """Folder or file that `sailyard ingest` understands; null for none."""

    weight: float = Field(1.0, ge=0)
    """Relative weight of the user's samples in every mix; 1 is as drawn. Our choice."""

    digest: str | None = None
    """sha256 over the data's files, filled in when a run is created, so that changed data
    change the cache key."""


class CaptionScores(Section):
    """Teacher scores of captions (paper section 3.1.1)."""

    num_scored: int = Field(3_000_000, ge=1)
    """Captions the teacher scores, at most. Paper section 3.1.1."""

    teacher: Literal["oracle", "api"] = "api"
    """api asks a vision-language model; oracle knows the small world's truth. Paper: an
    unnamed API."""

    api_base: str = "https://api.openai.com/v1"
    """Base URL of an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY."""

    api_model: str = "gpt-4o"
    """Model name at that endpoint. The paper names none; our choice."""

    concurrency: int = Field(16, ge=1, le=1024)
    """Requests in flight. Our choice."""


class JudgesRecipe(TrainRecipe):
    """Fine-tuning of the Score and Yes-or-No judges (paper section 3.1.1)."""

    num_train: int = Field(500_000, ge=1)
    """Scored captions to train on, resampled evenly over scores. Paper section 3.1.1."""

    vir_fraction: float = Field(1.0, gt=0, le=1)
    """Share of num_train that the VIR judges see: how much a caption says can be learned from fewer
    examples than whether it is true. The paper trains on as many; our choice: 1."""

    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the scored captions kept to measure the judges. Our choice."""

    min_precision: float = Field(0.90, ge=0, le=1)
    """Precision each judge must reach on them. Paper Table 2: about 0.90 and more."""

    min_recall: float = Field(0.90, ge=0, le=1)
    """Recall each judge must reach on them. Paper Table 2."""


class Caption2(Section):
    """Caption filter by the judges (paper section 3.1.1)."""

    min_score: int = Field(3, ge=1, le=5)
    """A caption is dropped if a score is lower. Paper section 3.1.1."""

    drop_on_no: bool = True
    """A judge's No drops a caption, too. Paper section 3.1.1."""

    batch_size: int = Field(64, ge=1)
    """Captions judged at once. Our choice."""


class Charts(Section):
    """Charts rendered by code from tables (paper section 3.1.1)."""

    types: list[ChartType] = Field(
        [
            "bar",
            "line",
            "pie",
            "scatter",
            "area",
            "histogram",
            "heatmap",
            "box",
        ]
    )
    """Kinds of chart. Paper section 3.1.1."""

    languages: list[Literal["en", "zh"]] = Field(["en", "zh"])
    """Languages of captions and questions, in equal shares. Paper section 3.1.1: 1:1."""

    questions_per_chart: int = Field(3, ge=1)
    """Question-answer pairs per chart. The paper is silent; our choice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.types or not self.languages:
            raise ValueError("types and languages need at least one member each")
        return self


class SyntheticVQA(Section):
    """Questions and answers written from captions (paper section 3.1.2)."""

    num_captions: int = Field(80_000_000, ge=1)
    """Captions used, at most. Paper section 3.1.2."""

    questions_per_caption: int = Field(4, ge=1)
    """Question-answer pairs per caption. Paper: several; our choice."""


class VideoFilter(Section):
    """Which video questions stay (paper section 4.1.1)."""

    min_alignment: int = Field(5, ge=-1, le=10)
    """Least video-question alignment, scored -1 to 10. Paper section 4.1.1."""

    min_richness: int = Field(5, ge=-1, le=7)
    """Least content richness, scored -1 to 7. Paper section 4.1.1."""

    min_difficulty: int = Field(3, ge=-1, le=8)
    """Least question difficulty, scored -1 to 8. Paper section 4.1.1."""

    num_frames: int = Field(16, ge=1)
    """Most frames kept of a clip, evenly spaced. The paper's evaluation takes 16."""


class Instruction2(Section):
    """Instruction curation (paper section 4.1.2)."""

    bucket_factor: int = Field(10, ge=1)
    """Latent classes per source category. Paper section 4.1.2: about ten times."""

    target_size: int = Field(20_000_000, ge=1)
    """Samples drawn evenly over the classes. Paper section 4.1.2."""

    min_quality: float = Field(0.8, ge=0, le=1)
    """Share of a source's probed samples that must be sound, or the source is refused. The
    paper is silent; our choice."""

    probe_size: int = Field(2_000_000, ge=1)
    """Samples of the subset on which sources are validated. Predecessor paper: 2M."""

    min_gain: float = Field(0.0, ge=-1, le=1)
    """Least rise of the probe's score when a source is added. Predecessor paper: raises or
    holds."""


class NgramBalance(Section):
    """Resampling that flattens the distribution of n-grams (paper section 3.2.2)."""

    n: list[int] = Field([2, 3, 4])
    """Lengths of the n-grams counted, words. The paper is silent; our choice."""

    temperature: float = Field(0.5, gt=0, le=1)
    """A sample weighs (frequency of its n-grams) ** -temperature. Paper silent; our choice."""

    cap: float = Field(4.0, ge=1)
    """Largest ratio of a weight to the mean weight, so that rare noise is not repeated without
    end. The paper is silent; our choice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.n or min(self.n) < 1:
            raise ValueError(f"n is {self.n}: name lengths of at least 1")
        return self


class MixRecipe(Section):
    """One training mix."""

    num_samples: int = Field(8_000_000, ge=1)
    """Samples in the mix, at most. Paper sections 2.1.1 and 3.2.1, by stage."""

    weights: dict[str, float] = Field({})
    """Relative weight of a source (Sample.source) or of an input of the stage; what is not
    named weighs 1. Ratios are not found in the paper; our choice."""

    temperature: float = Field(1.0, gt=0, le=1)
    """Source sizes are raised to this power before the weights: 1 keeps their proportions, 0.5
    flattens them. Paper section 3.2.2 gives the idea; our choice."""

    ngram: NgramBalance | None = None
    """n-gram balance of captions and synthetic questions, or null for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights {self.weights} must not be negative")
        return self


class Mixes(Section):
    """The mixes of the five stages before post-training."""

    warmup: MixRecipe = MixRecipe(num_samples=8_000_000)
    """Alignment stage I: 8M (paper section 2.1.1)."""

    fine_grained: MixRecipe = MixRecipe(num_samples=14_700_000)
    """Alignment stage II: stage I's data and 6.7M more captions (paper section 2.1.1)."""

    world_knowledge: MixRecipe = MixRecipe(num_samples=36_500_000)
    """Alignment stage III: 36.5M (paper section 2.1.1)."""

    basic: MixRecipe = MixRecipe(num_samples=64_000_000, temperature=0.5)
    """Basic pretraining: 64M, balanced over datasets (paper sections 3.2.1, 3.2.2)."""

    multitask: MixRecipe = MixRecipe(num_samples=180_000_000, ngram=NgramBalance())
    """Multi-task pretraining: 180M, balanced over n-grams (paper sections 3.2.1, 3.2.2)."""


class Sampling(Section):
    """Answers sampled from a policy."""

    samples_per_prompt: int = Field(4, ge=1)
    """Answers per prompt. Paper section 4.1.3: pass@4."""

    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature. The paper is silent; our choice."""

    max_new_tokens: int = Field(4096, ge=1)
    """Longest answer, tokens. Paper section 4.2.3."""

    batch_size: int = Field(64, ge=1)
    """Answers sampled at once. Our choice."""


class LongCoTData(Section):
    """Chain-of-thought data (paper section 4.1.3)."""

    num_samples: int = Field(400_000, ge=1)
    """Samples kept, at most. Paper section 4.1.3."""

    skills: list[str] = Field([])
    """Skills whose questions get a chain; all when empty. What one look answers needs none. Our
    choice: all."""

    max_overlap: float = Field(0.8, ge=0, le=1)
    """A thought is redundant if a larger share of its tokens is the answer's. Paper names the
    filter without a threshold; our choice."""

    length_bins: int = Field(10, ge=1)
    """Bins of the thought-length histogram that is balanced. Paper silent; our choice."""


class RLData(Sampling):
    """Prompts of verifiable RL: challenging yet solvable (paper section 4.1.3)."""

    num_prompts: int = Field(70_000, ge=1)
    """Prompts kept, at most. Paper section 4.2.3 (section 4.1.3 says 50K)."""


class ThinkFusionData(Sampling):
    """Direct answers and rejection-sampled thoughts (paper section 4.2.4)."""

    num_samples: int = Field(1_000_000, ge=1)
    """Samples in all. Paper section 4.2.4."""

    cot_fraction: float = Field(0.1, ge=0, le=1)
    """Share with a thought. Paper section 4.2.4: 100K of 1M."""


class MixedRLData(Sampling):
    """Prompts of mixed-reward RL (paper section 4.1.3)."""

    num_prompts: int = Field(100_000, ge=1)
    """Prompts in all. Paper section 4.1.3 (section 4.2.5 says 150K)."""

    hard_fraction: float = Field(0.5, ge=0, le=1)
    """Share of prompts that the policy often fails; the rest are general. Paper section 4.1.3:
    50K and 50K."""


class Curation(Section):
    """All data stages."""

    caption_scores: CaptionScores = CaptionScores()
    """Teacher scores."""

    judges: JudgesRecipe = JudgesRecipe(trainable=["vision", "adapter", "language"], lr=1e-5)
    """Judge training. The paper gives the data's size only; lr is our choice."""

    caption2: Caption2 = Caption2()
    """The caption filter."""

    charts: Charts = Charts()
    """Chart rendering."""

    vqa: SyntheticVQA = SyntheticVQA()
    """Questions from captions."""

    video: VideoFilter = VideoFilter()
    """The video filter."""

    instruction2: Instruction2 = Instruction2()
    """Instruction curation."""

    mix: Mixes = Mixes()
    """Training mixes."""

    longcot: LongCoTData = LongCoTData()
    """Chain-of-thought data."""

    rl_data: RLData = RLData()
    """Prompts of verifiable RL."""

    think_fusion: ThinkFusionData = ThinkFusionData()
    """Think-Fusion data."""

    mixed_rl_data: MixedRLData = MixedRLData()
    """Prompts of mixed-reward RL."""
