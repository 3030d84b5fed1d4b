"""The paper's published numbers that stand beside ours, as plain data.

Sources: SAIL-VL2 technical report, arXiv 2509.14033, Tables 2, 7, 8, 9 and 10. Scores are in
per cent unless said otherwise. They come from another harness (VLMEvalKit with an LLM judge)
on other data, so they are context for our numbers and never thresholds.
"""

from __future__ import annotations

from typing import Final

# Table 8 and 9. OCRBench is shown divided by 10, as the paper's average needs it.
OPENCOMPASS: Final[dict[str, dict[str, float]]] = {
    "SAIL-VL2-2B": {
        "MMBench v1.1": 86.77,
        "MMStar": 64.07,
        "AI2D": 83.00,
        "OCRBench": 89.50,
        "MMVet": 68.67,
        "HallusionBench": 51.74,
        "MMMU val": 47.67,
        "MathVista mini": 71.10,
    },
    "SAIL-VL2-AnyRes-2B": {
        "MMBench v1.1": 86.48,
        "MMStar": 63.40,
        "AI2D": 82.67,
        "OCRBench": 84.70,
        "MMVet": 67.80,
        "HallusionBench": 51.60,
        "MMMU val": 45.00,
        "MathVista mini": 66.80,
    },
    "SAIL-VL2-8B": {
        "MMBench v1.1": 90.16,
        "MMStar": 70.73,
        "AI2D": 87.73,
        "OCRBench": 91.30,
        "MMVet": 73.72,
        "HallusionBench": 55.10,
        "MMMU val": 55.44,
        "MathVista mini": 76.40,
    },
    "SAIL-VL2-A3B": {
        "MMBench v1.1": 90.63,
        "MMStar": 68.93,
        "AI2D": 86.63,
        "OCRBench": 90.60,
        "MMVet": 74.36,
        "HallusionBench": 52.81,
        "MMMU val": 60.56,
        "MathVista mini": 74.70,
    },
}
OPENCOMPASS_AVG: Final[dict[str, float]] = {
    "SAIL-VL2-2B": 70.31,
    "SAIL-VL2-AnyRes-2B": 68.56,
    "SAIL-VL2-8B": 75.07,
    "SAIL-VL2-A3B": 74.90,
}

# Table 10: OpenCompass multimodal reasoning, thinking models.
REASONING: Final[dict[str, dict[str, float]]] = {
    "SAIL-VL2-2B-Thinking": {
        "MathVista": 68.5,
        "MathVision": 27.5,
        "MathVerse": 43.4,
        "DynaMath": 20.2,
        "WeMath": 38.8,
        "LogicVista": 47.0,
    },
    "SAIL-VL2-8B-Thinking": {
        "MathVista": 75.8,
        "MathVision": 46.7,
        "MathVerse": 58.9,
        "DynaMath": 33.5,
        "WeMath": 54.9,
        "LogicVista": 56.4,
    },
    "SAIL-VL2-A3B-Thinking": {
        "MathVista": 73.0,
        "MathVision": 44.9,
        "MathVerse": 55.7,
        "DynaMath": 34.1,
        "WeMath": 54.2,
        "LogicVista": 59.7,
    },
}
REASONING_AVG: Final[dict[str, float]] = {
    "SAIL-VL2-2B-Thinking": 40.9,
    "SAIL-VL2-8B-Thinking": 54.4,
    "SAIL-VL2-A3B-Thinking": 53.6,
}

# Table 7, Qwen3 rows: distances between visual tokens and LM embedding rows.
# (before = AIMv2, after = SAIL-ViT)
ALIGNMENT: Final[dict[str, dict[str, tuple[float, float]]]] = {
    "Qwen3-0.6B": {
        "nearest_neighbour": (1.42, 1.15),
        "wasserstein": (4.86, 3.88),
        "mean_distance": (10.78, 9.52),
    },
    "Qwen3-1.7B": {
        "nearest_neighbour": (1.30, 1.05),
        "wasserstein": (4.65, 3.60),
        "mean_distance": (11.11, 9.89),
    },
    "Qwen3-8B": {
        "nearest_neighbour": (0.78, 0.66),
        "wasserstein": (3.59, 2.63),
        "mean_distance": (11.24, 10.06),
    },
}

# Table 2, SAIL-VL-1.5-2B judges: (precision, recall) as fractions.
JUDGES: Final[dict[str, tuple[float, float]]] = {
    "ita_score": (0.916, 0.903),
    "ita_yorn": (0.906, 0.924),
    "vir_score": (0.983, 0.975),
    "vir_yorn": (0.934, 0.954),
}


def for_report() -> dict[str, object]:
    """Everything above as one JSON-able object for report.json."""
    return {
        "opencompass": {
            name: {**rows, "average": OPENCOMPASS_AVG[name]} for name, rows in OPENCOMPASS.items()
        },
        "reasoning": {
            name: {**rows, "average": REASONING_AVG[name]} for name, rows in REASONING.items()
        },
        "alignment": {
            name: {metric: list(pair) for metric, pair in rows.items()}
            for name, rows in ALIGNMENT.items()
        },
        "judges": {name: list(pair) for name, pair in JUDGES.items()},
    }
