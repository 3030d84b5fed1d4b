"""Stage of the model soup: which checkpoints, by what weights (paper section 4.2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sailyard.recipe.stages import Soup
from sailyard.stage import StageContext
from training.averaging import average, check_homogeneous


def run(ctx: StageContext) -> None:
    """Stage `post_training.soup`: check, choose if greedy, average in fp32, record ingredients.

    `ingredient_digests` names all that were offered, `weights` and `distance` those in it.
    """
    recipe: Soup = ctx.section("post_training.soup")
    ingredients = {name: ctx.input(name) for name in ctx.input_names if name != "heldout"}
    check_homogeneous(ingredients)
    digests = {name: ctx.input_digest(name) for name in ingredients}
    weights = soup_weights(list(ingredients), recipe.weights)
    if recipe.method == "greedy":
        # Imported only here: to average files needs no network.
        from training.greedy import choose, token_loss, validation_samples

        torch.set_num_threads(recipe.threads)
        samples = validation_samples(ctx.input("heldout"), recipe.validation_per_skill)
        found = choose(ingredients, weights, lambda path: token_loss(path, samples), ctx.scratch())
        ctx.summary(greedy={**found, "num_samples": len(samples)})
        ingredients = {name: ingredients[name] for name in found["taken"]}
        weights = {name: weights[name] for name in found["taken"]}
    distances = average(ingredients, weights, ctx.output("checkpoint"))
    ctx.summary(
        num_ingredients=len(ingredients),
        ingredient_digests=digests,
        weights=weights,
        distance=distances,
    )


def soup_weights(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Weight of each ingredient, uniform unless given.

    Raises ValueError when `weights` are not those of exactly these ingredients.
    """
    if not weights:
        return dict.fromkeys(names, 1.0)
    if set(weights) != set(names):
        raise ValueError(
            f"post_training.soup.weights names {sorted(weights)}, the ingredients are "
            f"{sorted(names)}: weigh all of them, or none for the plain mean"
        )
    return {name: float(weights[name]) for name in names}
