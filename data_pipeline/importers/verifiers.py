"""Traces of verifiers: a tree of messages, in which a branch ends at each leaf. A sampled message is a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.reader import Context, Parsed, Reader, conversation, full_list, note, tools_of


def matches(row: Mapping[str, Any]) -> str | None:
    """Whether the row has nodes with messages."""
    nodes = row.get("nodes")
    if isinstance(nodes, list) and nodes and isinstance(nodes[0], dict) and "message" in nodes[0]:
        return "`nodes` with `message` and `parent`"
    return None


def parse(row: dict[str, Any], context: Context) -> list[Parsed]:
    """A trajectory for each leaf. A node that several leaves share is a step in the first of them only."""
    nodes = full_list(row.get("nodes"), "nodes")
    for index, node in enumerate(nodes):
        parent = node.get("parent") if isinstance(node, dict) else index
        if parent is not None and not (isinstance(parent, int) and 0 <= parent < index):
            raise DataError(f"nodes[{index}]: parent is not the index of an earlier node")
    parents = {node["parent"] for node in nodes if node.get("parent") is not None}
    leaves = [index for index in range(len(nodes)) if index not in parents]
    if len(leaves) > 1:
        note(context.notes, "branches of traces, each a trajectory of its own", len(leaves))
    task = row.get("task")
    tools = tools_of(row.get("tools") or row.get("tool_defs"))
    fields: dict[str, Any] = {"tools": tools} if tools else {}
    if isinstance(task, dict) and isinstance(task.get("key"), str):
        fields["task"] = task["key"]
    elif isinstance(task, str) and task:
        fields["task"] = task
    seen: set[int] = set()
    trajectories = []
    for leaf in leaves:
        path = []
        at: int | None = leaf
        while at is not None:
            path.append(at)
            at = nodes[at].get("parent")
        path.reverse()
        parsed = conversation([nodes[index].get("message") for index in path], context, "nodes")
        steps = {index for index in path if nodes[index].get("sampled") and index not in seen}
        seen |= steps
        messages = [
            message | {"step": False} if message["role"] == "assistant" and path[origin] not in steps else message
            for message, origin in zip(parsed.messages, parsed.origins, strict=True)
        ]
        trajectories.append(parsed._replace(messages=messages, fields=fields, used={"nodes", "tools", "tool_defs"}))
    return trajectories


READER = Reader("verifiers", "verifiers and prime-rl (traces)", matches, parse, outcome=("outcome", "reward"))
