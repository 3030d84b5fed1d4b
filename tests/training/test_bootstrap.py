"""Where the small language model starts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model.tokenizer import train_tokenizer
from tests.model.tiny import TEXTS, VOCAB, network
from training.bootstrap import start_compounds

SPOKEN = " red circle blue square top left"


def test_a_compound_word_starts_as_the_sum_of_its_parts() -> None:
    compounds = {
        "topleftredcircle": ["top left", "red", "circle"],
        "bluesquare": ["blue", "square"],
    }
    tokenizer = train_tokenizer([*TEXTS, SPOKEN] * 9, VOCAB, list(compounds))
    language = network().language_model
    table = language.get_input_embeddings().weight
    before = table.detach().clone()
    start_compounds(language, tokenizer, compounds)

    def vector(word: str) -> torch.Tensor:
        (index,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        return table[index].detach()

    blue, square, both = vector(" blue"), vector(" square"), vector("bluesquare")
    assert F.cosine_similarity(both, blue + square, dim=0) > 0.999
    assert 0.5 < both.norm() / blue.norm() < 2
    # What shares a part lies nearer than what shares none.
    placed = vector("topleftredcircle")
    near, far = (F.cosine_similarity(placed, vector(w), dim=0) for w in (" red", " blue"))
    assert near > far + 0.2
    changed = (table.detach() != before).any(dim=1).nonzero().flatten().tolist()
    assert sorted(changed) == sorted(tokenizer.convert_tokens_to_ids(w) for w in compounds)
