"""The README says what is there: nodes, workflows, files, links, commands and messages are compared with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tools.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    section = README.split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", section, re.M).group().splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def sources() -> str:
    """All texts of nodes and core; strings that were broken over lines are put together."""
    files = [*(ROOT / "nodes").glob("*.py"), *(ROOT / "sana_video_core").rglob("*.py")]
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)


def test_the_node_table_is_the_list_of_nodes():
    locale = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    rows = {cells[1].strip("`"): cells[0] for cells in table("## Nodes")}
    assert rows == {node: entry["display_name"] for node, entry in locale.items()}


def test_the_workflow_table_is_the_folder():
    assert sorted(cells[0].strip("`") for cells in table("## Workflows")) == [path.stem for path in WORKFLOWS]
    assert all(path.with_suffix(".jpg").stat().st_size < 300_000 for path in WORKFLOWS)


def test_the_file_table_has_the_links_of_the_workflows():
    linked = {model["url"].replace("/resolve/", "/blob/"): model for path in WORKFLOWS
              for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] for model in node["properties"].get("models", [])}
    assert len(linked) == 4
    rows = table("### Which file goes where")
    for url, model in linked.items():
        row = next(cells for cells in rows if f"[{model['name']}]({url})" in cells[1])
        assert row[2] == f"`{model['directory']}`"


def test_files_that_the_readme_shows_exist():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / t).is_file()] == []
    assert sum(file.stat().st_size for file in (ROOT / "assets").glob("*")) < 1_500_000


def test_commands_exist():
    shown = subprocess.run([sys.executable, ROOT / "run.py", "--help"], capture_output=True, text=True).stdout
    known = set(re.findall(r"^    (\w+) ", shown, re.MULTILINE))
    named = set(re.findall(r"python3 run\.py (\w+)", README))
    assert {"demo", "test"} <= named <= known


@pytest.mark.parametrize("text", re.findall("`([^`]+)`", "".join(row[0] for row in table("## When something is refused")[1:])))
def test_quoted_messages_are_messages_of_ours(text):
    assert text in sources()


def test_sizes_and_settings_are_those_of_the_specs():
    from sana_video_core.specs import SPECS

    columns = ("sana-video-2b-480p", "sana-video-2b-720p", "longsana-2b-480p", "sana-video-mini", "sana-video-mini-long")
    rows = {cells[0]: cells[1:] for cells in table("### Settings to start with")}
    for column, name in enumerate(columns):
        spec = SPECS[name]
        assert rows["size"][column].startswith(f"{spec.size[0]} x {spec.size[1]}")
        assert rows["frames"][column] == f"{spec.frames} ({spec.vae.stride[0]}n+1)"
        assert rows["CFG"][column] == f"{spec.cfg:g}"
        assert str(spec.steps) in rows["steps"][column]
