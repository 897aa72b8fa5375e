"""Greedy generation: a prompt's continuation does not depend on the prompts beside it."""

import pytest
from zoo import FAMILIES, tiny_config, tiny_model

from elo.evaluate.writing import write_greedily

PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [8, 9], [7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3]]
LENGTH = 12


@pytest.mark.parametrize("family", ["llama-untied", "gemma3", "gpt2", "bloom", "mamba", "rwkv", "glm_moe_dsa"])
def test_prompts_of_several_lengths_together_and_alone(family):
    model_type, particular = FAMILIES[family]
    model = tiny_model(tiny_config(model_type, **particular)).eval()
    alone = [write_greedily(model, [each], stops=[1], max_new_tokens=LENGTH)[0] for each in PROMPTS]
    assert write_greedily(model, PROMPTS, stops=[1], max_new_tokens=LENGTH, batch_size=3) == alone
    stop = alone[0][4]
    stopped = write_greedily(model, PROMPTS, stops=[1, stop], max_new_tokens=LENGTH, batch_size=3)
    for whole, cut in zip(alone, stopped, strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)
