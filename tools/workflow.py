"""A workflow as the browser saves it, turned into the prompt that the server runs.

Covers what our own workflows use: plain nodes, widgets, links, notes, muted and bypassed nodes. Subgraphs and Primitive or
Reroute nodes are refused by name instead of being guessed at. The browser's own export is the reference: a test compares.
"""

from __future__ import annotations

from .places import RunError

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
SEED_MODES = ("fixed", "increment", "decrement", "randomize")
NOTES = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4


def to_api(workflow: dict, object_info: dict) -> dict:
    """{node id: {class_type, inputs, _meta}} of a UI workflow; ``object_info`` is the server's /object_info."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    for node in nodes.values():
        if node["type"] not in object_info:
            raise RunError(f"The workflow uses the node '{node['type']}', which this ComfyUI does not have.")
    prompt = {}
    for key, node in nodes.items():
        if node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        inputs = widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs", []):
            source = resolve(slot, slot.get("link"), links, nodes)
            if source is not None:
                inputs[slot["name"]] = [str(source[0]), source[1]]
            elif slot.get("link") is not None:
                inputs.pop(slot["name"], None)
        title = node.get("title") or object_info[node["type"]]["display_name"] or node["type"]
        prompt[str(key)] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def resolve(slot: dict, link: int | None, links: dict, nodes: dict) -> tuple[int, int] | None:
    """(node id, output slot) that a link really comes from: through bypassed nodes, and None behind a muted one."""
    while link is not None:
        source, output = links[link]
        node = nodes.get(source)
        mode = node.get("mode", 0) if node else MUTED
        if mode not in (MUTED, BYPASSED):
            return source, output
        if mode == MUTED:
            return None
        kind = node["outputs"][output]["type"]
        passing = [item for item in node.get("inputs", []) if item["type"] == kind]
        same_place = node.get("inputs", [])[output:output + 1]
        link = next((item.get("link") for item in [*[i for i in same_place if i in passing], *passing]), None)
    return None


def widget_values(node: dict, info: dict) -> dict:
    """Widget names and values of a node. The saved list is positional, with a seed's mode between the widgets."""
    values = node.get("widgets_values") or []
    if not isinstance(values, list):
        raise RunError(f"The node '{node['type']}' keeps its widgets in a form that is not supported.")
    rest, inputs = list(values), {}
    for name, (kind, options) in declared(info):
        if not is_widget(kind, options) or not rest:
            continue
        value = inputs[name] = rest.pop(0)
        if rest and rest[0] in SEED_MODES and (options.get("control_after_generate") or name in ("seed", "noise_seed")):
            rest.pop(0)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            for option in options["options"]:
                if option["key"] == value:
                    take_nested(name, option, rest, inputs)
    return inputs


def declared(info: dict) -> list[tuple[str, tuple]]:
    """(name, (type, options)) of all inputs in their order."""
    found = []
    for group in ("required", "optional"):
        for name in info.get("input_order", {}).get(group, []):
            kind, *more = info["input"][group][name]
            found.append((name, (kind, more[0] if more else {})))
    return found


def is_widget(kind: object, options: dict) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def take_nested(name: str, option: dict, rest: list, inputs: dict) -> None:
    """The widgets that a dynamic choice brings along, named 'choice.widget'."""
    for group in ("required", "optional"):
        for inner, (kind, *more) in option.get("inputs", {}).get(group, {}).items():
            if rest and is_widget(kind, more[0] if more else {}):
                inputs[f"{name}.{inner}"] = rest.pop(0)
