"""Plans as files: edited by people, handed back, and refused where they cannot be."""

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
        (lambda p: p["types"].update({"blk.99.attn_q.weight": "Q8_0"}), r"names blk\.99\.attn_q"),
        (lambda p: p["types"].pop(QUERY), "gives blk.1.attn_q.weight no type"),
        (lambda p: p["types"].update({QUERY: "Q4_K"}), "Q4_K does not fit blk.1.attn_q.weight"),
        (
            lambda p: p["types"].update({QUERY: "Q9"}),
            r"cannot store blk\.1\.attn_q\.weight so: no type 'Q9'",
        ),
        (lambda p: p.update(expert_width=48), "experts 48 wide"),
        (lambda p: p.update(expert_width=float("inf")), "this is no quantisation plan"),
        (lambda p: p.pop("types"), "it has no 'types'"),
        (lambda p: p.update(types=[]), "this is no quantisation plan"),
        (lambda p: p.update(expert_width=32.5), "its 'expert_width' is 32.5"),
        (lambda p: p.update(recipe=None), "its 'recipe' is None"),
        (lambda p: p.update(recipe="\x1b[31m"), "its 'recipe' is"),
        (lambda p: p.update(file_type=-1), "its 'file_type' is -1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        edited(change).tensors(CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="this is no quantisation plan"):
        QuantPlan.from_json(text)


def test_a_line_copied_and_not_changed_by_its_name_is_noticed() -> None:
    text = make_plan(CONFIG, "Q8_0").to_json()
    with pytest.raises(UsageError, match=rf"it has '{QUERY}' twice"):
        QuantPlan.from_json(text.replace(f'"{QUERY}"', f'"{QUERY}": "Q4_0", "{QUERY}"'))


def test_files_come_from_any_editor_and_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = make_plan(CONFIG, "Q8_0").to_json()
    path.write_text(text, encoding="utf-8-sig")
    assert load_plan(path) == make_plan(CONFIG, "Q8_0")
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UsageError, match=r"plan\.json: .* not in UTF-8"):
        load_plan(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"plan\.json: .* it has no 'expert_width'"):
        load_plan(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"plan\.json: .* too large"):
        load_plan(path)
    with pytest.raises(UsageError, match=r"cannot read the plan .*: Is a directory"):
        load_plan(tmp_path)
