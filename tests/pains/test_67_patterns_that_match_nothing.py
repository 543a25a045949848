"""No. 67: each entry of a pattern or layer filter does what it says on some layer, or is an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
from small_llama import llama

from trimtab import LoraConfig, get_peft_model, get_peft_model_state_dict
from trimtab.errors import NoMatch

BARE, DOTTED = "v_proj", "layers.1.self_attn.v_proj"
ANCHORED, WHOLE = r"^model\.layers\.1\.self_attn\.v_proj$", "model.layers.1.self_attn.v_proj"


def made(**fields: Any) -> Any:
    return get_peft_model(llama(), LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | fields))


@pytest.mark.parametrize(("pattern", "layers"), [(BARE, [0, 1]), (DOTTED, [1]), (ANCHORED, [1]), (WHOLE, [1])])
def test_bare_dotted_anchored_and_whole_names_match(pattern: str, layers: list[int]) -> None:
    model = made(rank_pattern={pattern: 5}, alpha_pattern={pattern: 15})
    state = get_peft_model_state_dict(model)
    got = {k.split("layers.")[1].split(".lora_A")[0]: v.shape[0] for k, v in state.items() if "lora_A" in k}
    want = {f"{i}.self_attn.{t}_proj": 5 if t == "v" and i in layers else 2 for i in (0, 1) for t in "qv"}
    assert got == want
    scales = [model.get_base_model().model.layers[i].self_attn.v_proj.adapters["default"].s for i in (0, 1)]
    assert scales == [3.0 if i in layers else 2.0 for i in (0, 1)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj'"),
        ({"rank_pattern": {"v_proj": 4, "_proj": 3}}, "rank_pattern: '_proj'"),  # a part of a name is no name
        ({"alpha_pattern": {"^layers.0.self_attn.v_proj": 4}}, "alpha_pattern: "),  # anchored where the path does not begin
        ({"layers_to_transform": [2]}, r"layers_to_transform=\[2\]"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform: 2 is the number of none"),
        ({"exclude_modules": ["v_prj"]}, "exclude_modules: 'v_prj'"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern"),
        ({"target_modules": ["v_proj", "w_proj"]}, "'w_proj'. Did you mean"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(NoMatch, match=named):
        made(**fields)
