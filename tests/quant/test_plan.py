"""Plan files: edited by people, and refused if they are not plans or do not fit the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dots1_local.architecture import Dots1Config
from dots1_local.errors import UsageError
from dots1_local.quant.plan import QuantPlan, load_plan
from dots1_local.quant.recipes import make_plan
from tests.micro import micro_config

CONFIG = Dots1Config.from_json(micro_config())
QUERY = "blk.1.attn_q.weight"


def edited(change: Callable[[dict[str, Any]], object]) -> QuantPlan:
    content = json.loads(make_plan(CONFIG, "Q8_0").to_json())
    change(content)
    return QuantPlan.from_json(json.dumps(content))


def test_an_edited_plan_is_followed() -> None:
    assert edited(lambda plan: None) == make_plan(CONFIG, "Q8_0")
    plan = edited(lambda plan: plan["types"].update({QUERY: "q4_0"}))
    kinds = {tensor.spec.name: tensor.kind.name for tensor in plan.tensors(CONFIG)}
    assert kinds == {**make_plan(CONFIG, "Q8_0").types, QUERY: "Q4_0"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["types"].update({"blk.99.attn_q.weight": "Q8_0"}), r"blk\.99\.attn_q"),
        (lambda p: p["types"].pop(QUERY), r"blk\.1\.attn_q\.weight"),
        (lambda p: p["types"].update({QUERY: "Q4_K"}), r"Q4_K .* blk\.1\.attn_q\.weight"),
        (lambda p: p["types"].update({QUERY: "Q9"}), r"blk\.1\.attn_q\.weight.* 'Q9'"),
        (lambda p: p["types"].update({QUERY: 3}), r"blk\.1\.attn_q\.weight.* '3'"),
        (lambda p: p.update(expert_width=48), "experts 48 wide"),
        (lambda p: p.update(expert_width=float("inf")), "Infinity"),
        (lambda p: p.pop("types"), "types"),
        (lambda p: p.update(types=[]), "types: .* array"),
        (lambda p: p.update(expert_width=32.5), "expert_width: .* float"),
        (lambda p: p.update(recipe=None), "recipe: .* null"),
        (lambda p: p.update(recipe="\x1b[31m"), "recipe: "),
        (lambda p: p.update(file_type=-1), "file_type: "),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        edited(change).tensors(CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_text_that_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a quantisation plan"):
        QuantPlan.from_json(text)


def test_a_tensor_that_is_named_twice_is_refused() -> None:
    text = make_plan(CONFIG, "Q8_0").to_json()
    with pytest.raises(UsageError, match=rf"'{QUERY}' twice"):
        QuantPlan.from_json(text.replace(f'"{QUERY}"', f'"{QUERY}": "Q4_0", "{QUERY}"'))


def test_files_come_from_any_editor_and_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = make_plan(CONFIG, "Q8_0").to_json()
    path.write_text(text, encoding="utf-8-sig")
    assert load_plan(path) == make_plan(CONFIG, "Q8_0")
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match=r"plan\.json .* UTF-8"):
        load_plan(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"plan\.json .*recipe"):
        load_plan(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"plan\.json .*too large"):
        load_plan(path)
    with pytest.raises(UsageError, match="is not a file"):
        load_plan(tmp_path)


def test_a_placement_plan_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"format": "dots1-placement", "version": 1, "layers": {}}')
    with pytest.raises(
        UsageError, match=r"plan\.json .*dots1 plan.*dots1 convert --dry-run --json"
    ):
        load_plan(path)
