"""The calibration benchmark measures what it says, before and after."""

from __future__ import annotations

import json

import pytest

from benchmarks.calibration import main, shape_of
from sailyard.recipe import load_recipe


@pytest.mark.slow
def test_a_short_run_reports_both_measures(capsys):
    main(["--texts=200", "--steps=4", "--calibration-steps=2", "--json"])
    result = json.loads(capsys.readouterr().out)
    for kind in ("text", "multimodal"):
        before, after = (result[when][kind] for when in ("before", "after"))
        assert 0 < before["router_entropy"] <= 1
        assert before["router_entropy"] != after["router_entropy"]
        rise = after["router_entropy"] / before["router_entropy"] - 1
        assert result["entropy_rise"][kind] == pytest.approx(rise)
        change = after["token_loss"] / before["token_loss"] - 1
        assert result["loss_change"][kind] == pytest.approx(change)


def test_experts_are_cut_and_none_is_added():
    whole, cut = load_recipe("tiny-moe").model.language.moe, shape_of(32).language.moe
    assert whole is not None
    assert cut is not None
    assert cut.num_experts == 32
    assert cut.num_experts * cut.expert_intermediate_size == (
        whole.num_experts * whole.expert_intermediate_size
    )
    assert cut.aux_loss_coef == 0
