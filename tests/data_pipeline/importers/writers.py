"""Conversations written as other tools write them, from one neutral form, and read back into it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a tool, and what came back."""

    name: str
    arguments: dict[str, Any]
    result: str


class Turn(NamedTuple):
    """A turn of the agent: what it thought, said and called; or, without an agent, what the user said."""

    text: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    is_agent: bool = True


Talk = list[Turn]


def openai(talk: Talk) -> dict[str, Any]:
    """As `message.model_dump()` of OpenAI's SDK."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        if not turn.is_agent:
            messages.append({"role": "user", "content": turn.text})
            continue
        calls = [
            {
                "id": f"{number}-{n}",
                "type": "function",
                "function": {"name": c.name, "arguments": json.dumps(c.arguments)},
            }
            for n, c in enumerate(turn.calls)
        ]
        unused = dict.fromkeys(("refusal", "annotations", "audio", "function_call"))
        thought = {"reasoning_content": turn.reasoning or None}
        messages.append({"role": "assistant", "content": turn.text, "tool_calls": calls or None, **thought, **unused})
        for n, c in enumerate(turn.calls):
            messages.append({"role": "tool", "tool_call_id": f"{number}-{n}", "content": c.result})
    return {"messages": messages}


def anthropic(talk: Talk) -> dict[str, Any]:
    """Blocks; results of tools and the text after them are one user message."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        if not turn.is_agent:
            blocks = [{"type": "text", "text": turn.text}]
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += blocks
            else:
                messages.append({"role": "user", "content": blocks})
            continue
        blocks = [{"type": "thinking", "thinking": turn.reasoning, "signature": "s"}] if turn.reasoning else []
        blocks += [{"type": "text", "text": turn.text}] if turn.text else []
        blocks += [
            {"type": "tool_use", "id": f"{number}-{n}", "name": c.name, "input": c.arguments}
            for n, c in enumerate(turn.calls)
        ]
        messages.append({"role": "assistant", "content": blocks})
        if turn.calls:
            results = [
                {"type": "tool_result", "tool_use_id": f"{number}-{n}", "content": [{"type": "text", "text": c.result}]}
                for n, c in enumerate(turn.calls)
            ]
            messages.append({"role": "user", "content": results})
    return {"messages": messages, "tools": [{"name": "t", "input_schema": {"type": "object"}}]}


def responses(talk: Talk) -> dict[str, Any]:
    """Items of the Responses API."""
    items: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        if not turn.is_agent:
            items.append({"role": "user", "content": [{"type": "input_text", "text": turn.text}]})
            continue
        if turn.reasoning:
            items.append(
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": turn.reasoning}]}
            )
        if turn.text or not turn.calls:
            content = [{"type": "output_text", "text": turn.text, "annotations": []}]
            items.append({"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": content})
        for n, c in enumerate(turn.calls):
            called = {"call_id": f"{number}-{n}", "name": c.name, "arguments": json.dumps(c.arguments)}
            items.append({"type": "function_call", "id": "f", "status": "completed", **called})
        for n, c in enumerate(turn.calls):
            items.append({"type": "function_call_output", "call_id": f"{number}-{n}", "output": c.result})
    return {"input": items[:1], "output": items[1:]}


def langchain(talk: Talk) -> dict[str, Any]:
    """As `messages_to_dict`."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        if not turn.is_agent:
            messages.append({"type": "human", "data": {"content": turn.text, "type": "human", "example": False}})
            continue
        calls = [
            {"name": c.name, "args": c.arguments, "id": f"{number}-{n}", "type": "tool_call"}
            for n, c in enumerate(turn.calls)
        ]
        more = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        data = {
            "content": turn.text,
            "tool_calls": calls,
            "invalid_tool_calls": [],
            "additional_kwargs": more,
            "id": "r",
        }
        messages.append({"type": "ai", "data": data})
        for n, c in enumerate(turn.calls):
            messages.append({"type": "tool", "data": {"content": c.result, "tool_call_id": f"{number}-{n}"}})
    return {"messages": messages}


def atif(talk: Talk) -> dict[str, Any]:
    """Harbor's format."""
    steps: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        step: dict[str, Any] = {
            "step_id": number + 1,
            "source": "agent" if turn.is_agent else "user",
            "message": turn.text,
        }
        if turn.reasoning:
            step["reasoning_content"] = turn.reasoning
        if turn.calls:
            step["tool_calls"] = [
                {"tool_call_id": f"{number}-{n}", "function_name": c.name, "arguments": c.arguments}
                for n, c in enumerate(turn.calls)
            ]
            results = [{"source_call_id": f"{number}-{n}", "content": c.result} for n, c in enumerate(turn.calls)]
            step["observation"] = {"results": results}
        steps.append(step)
    return {"schema_version": "ATIF-v1.8", "session_id": "s", "agent": {"name": "a", "version": "1"}, "steps": steps}


def verifiers(talk: Talk) -> dict[str, Any]:
    """A trace without branches."""
    nodes: list[dict[str, Any]] = []
    for message in openai(talk)["messages"]:
        parent = len(nodes) - 1 if nodes else None
        nodes.append({"parent": parent, "message": message, "sampled": message["role"] == "assistant"})
    return {"version": 1, "id": "x", "nodes": nodes, "reward": 1.0}


def inspect(talk: Talk) -> dict[str, Any]:
    """A sample of inspect_ai."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(talk):
        if not turn.is_agent:
            messages.append({"id": "u", "role": "user", "source": "input", "content": turn.text})
            continue
        content: Any = turn.text
        if turn.reasoning:
            content = [{"type": "reasoning", "reasoning": turn.reasoning}, {"type": "text", "text": turn.text}]
        calls = [
            {"id": f"{number}-{n}", "function": c.name, "arguments": c.arguments, "type": "function"}
            for n, c in enumerate(turn.calls)
        ]
        message = {"id": "a", "role": "assistant", "source": "generate", "model": "m", "content": content}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
        for n, c in enumerate(turn.calls):
            messages.append(
                {"id": "t", "role": "tool", "content": c.result, "tool_call_id": f"{number}-{n}", "function": c.name}
            )
    return {"id": 1, "epoch": 1, "target": "x", "messages": messages, "scores": {"match": {"value": "C"}}}


WRITERS = {
    "openai": openai,
    "anthropic": anthropic,
    "responses": responses,
    "langchain": langchain,
    "atif": atif,
    "verifiers": verifiers,
    "inspect": inspect,
}


def read_back(messages: list[dict[str, Any]]) -> Talk:
    """The neutral form of the messages of a trajectory."""
    talk: Talk = []
    results = {message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"}
    for message in messages:
        if message["role"] == "tool":
            continue
        calls = tuple(
            Call(call["function"]["name"], json.loads(call["function"]["arguments"]), results.pop(call["id"]))
            for call in message.get("tool_calls", ())
        )
        text, thought = message.get("content") or "", message.get("reasoning_content", "")
        talk.append(Turn(text, thought, calls, message["role"] == "assistant"))
    assert not results  # a result without its call
    return talk
