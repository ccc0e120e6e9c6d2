"""Contract: every figure in the tables of docs/plan.md is what the planner says today."""

import re
from pathlib import Path

import pytest

from vlmdeploy.plan.device import plan_device
from vlmdeploy.plan.draft import Plan
from vlmdeploy.plan.options import PlanOptions
from vlmdeploy.plan.planned_model import released_model
from vlmdeploy.plan.planner import make_plan

PAGE = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
INT4 = {"vision": "int4", "connector": "int4"}


def planned(family: str, device: str, precisions: dict[str, str]) -> Plan:
    return make_plan(released_model(family), plan_device(device), PlanOptions(precisions=precisions))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, head and rule left out."""
    section = PAGE.split(heading, 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("cells", rows("## What the released models need"), ids=lambda cells: cells[0])
def test_weights(cells: list[str]) -> None:
    plan = planned(cells[0].strip("`"), "agx-orin-64", INT4)
    sizes = [f"{size / 1e9:.3f}" for size in plan.weights_bytes.values()]
    assert cells[1:] == [*sizes, f"{sum(plan.weights_bytes.values()) / 1e9:.2f}", f"{plan.kv_bytes_per_token:,}"]


@pytest.mark.parametrize(("heading", "precisions"), [("### Encoder in int4", INT4), ("### Encoder in fp16", {})])
def test_memory_speed_and_verdict(heading: str, precisions: dict[str, str]) -> None:
    found = rows(heading)
    assert len(found) == 9, "three models on three devices"
    for family, device, *cells in found:
        plan = planned(family.strip("`"), device.strip("`"), precisions)
        assert plan.build is not None and plan.speed.ttft_s is not None
        assert cells == [
            " / ".join(f"{size / 1e9:.1f}" for size in plan.peak_bytes.values()),
            f"{plan.build.least_ram_bytes / 1e9:.1f}",
            " to ".join(f"{seconds:.1f}" for seconds in plan.speed.ttft_s),
            " to ".join(f"{rate:.0f}" for rate in plan.speed.decode_tok_s),
            plan.verdict,
        ]


def test_profile_on_the_page_is_one(tmp_path: Path) -> None:
    profile = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0]
    (tmp_path / "board.toml").write_text(profile)
    assert plan_device(str(tmp_path / "board.toml")).usable_bytes == 13_500_000_000
