"""Choosing among fixed answers: equal to a plain forward, and branches never see each other."""

from __future__ import annotations

import pytest
import torch

from evaluation.choices import AmbiguousChoices, Question, choice_probabilities, choice_tokens, grow
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from sailyard.media import decode_image
from tests.evaluation.tiny import captions, tiny_model

Model = tuple[SailVLForConditionalGeneration, SailVLProcessor]
SCORES = ("1", "2", "3", "4", "5")


@pytest.fixture(scope="module")
def network() -> Model:
    torch.set_num_threads(1)
    return tiny_model()


def questions(caption: str) -> list[Question]:
    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"<image>\nCaption: {caption}\n{text}"}]

    return [Question(turn("Score 1 to 5."), SCORES), Question(turn("Fit?"), ("yes", "no"))]


def test_equal_to_a_forward_of_each_question_alone(network: Model) -> None:
    model, processor = network
    samples = list(captions(5))
    images = [[decode_image(data) for data in sample.images] for sample in samples]
    asked = [questions(sample.messages[1]["content"]) for sample in samples]
    tables = choice_probabilities(model, processor, images, asked, batch_size=3)
    assert [table.shape for table in tables] == [(5, 5), (5, 2)]
    for k in range(2):
        for row in range(5):
            question = asked[row][k]
            encoded = processor.encode(question.messages, images[row], add_generation_prompt=True)
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.from_numpy(encoded.input_ids)[None],
                    pixel_values=torch.from_numpy(encoded.pixel_values),
                ).logits[0, -1]
            ids = choice_tokens(processor, question.choices)
            expected = logits[ids].double().softmax(dim=-1).numpy()
            assert tables[k][row] == pytest.approx(expected, abs=1e-6)


def test_the_trunk_is_shared_once(network: Model) -> None:
    _, processor = network
    sample = next(captions(1))
    images = [decode_image(data) for data in sample.images]
    encoded = [
        processor.encode(question.messages, images, add_generation_prompt=True)
        for question in questions("a red circle")
    ]
    tree = grow(encoded)
    assert len(tree.input_ids) < sum(len(item.input_ids) for item in encoded)
    for number, item in enumerate(encoded, start=1):
        path = (tree.branch == 0) | (tree.branch == number)
        assert tree.input_ids[path].tolist() == item.input_ids.tolist()
        assert tree.position_ids[path].tolist() == list(range(len(item.input_ids)))


def test_answers_that_begin_alike_are_refused(network: Model) -> None:
    with pytest.raises(AmbiguousChoices, match="different tokens"):
        choice_tokens(network[1], ("yes", "yes"))
