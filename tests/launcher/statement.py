"""The last lines of launch_tpu.sh, "cost: ...", compared with the ledger of the fake cloud."""

from __future__ import annotations

import re
from typing import NamedTuple

KINDS = {"machine": "nodes", "queued resource": "queuedResources"}
FREE = ("STOPPED", "PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED", "ACCEPTED", "WAITING_FOR_RESOURCES")
PREFIX = "launch_tpu: cost: "


class Statement(NamedTuple):
    """What the script says: resources {(kind, zone): line}, and what it does not know."""

    resources: dict[tuple[str, str], str]
    nothing: bool
    may_appear: bool
    unknown: bool
    secret: str
    secret_line: str


def statement(stderr: str) -> Statement:
    """Parses the last lines. They must be the end of the output."""
    lines = stderr.splitlines()
    costs = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    assert costs and all(line.startswith(PREFIX) for line in lines[-len(costs) :]), stderr
    resources, text = {}, "\n".join(costs)
    for line in costs:
        if match := re.match(r"(machine|queued resource) \S+ in (\S+) is (.+)", line):
            resources[KINDS[match[1]], match[2]] = match[3]
    secret = "unknown" if "unknown whether secret" in text else "exists" if "secret jaxprm-" in text else "absent"
    return Statement(
        resources,
        "no machine and no queued resource" in text,
        "could still create it" in text,
        bool(re.search(r"unknown whether (anything else of )?prm exists", text)),
        secret,
        costs[-1],
    )


def disagreements(stderr: str, ledger: dict, unknown: str | None = "") -> list[str]:
    """What the statement and the ledger disagree about.

    unknown: "machine", "secret" or both, if the script had no way to see it. Elsewhere "unknown" is wrong. With
    None, the script may know or not.
    """
    said = statement(stderr)
    if unknown is None:
        unknown = "machine " * said.unknown + "secret" * (said.secret == "unknown")
    lives = {(kind, *key): life for kind in KINDS.values() for key, life in ledger[kind].items()}
    exist = {(kind, zone): life for (kind, zone, name), life in lives.items() if name == "prm"}
    visible = {key: life[0] for key, life in exist.items() if life[0] != "ABSENT"}
    pending = {key for key, life in exist.items() if life[0] == "ABSENT" and len(life) > 1}
    wrong = []
    if said.unknown != ("machine" in unknown):
        wrong.append(f"the machine is unknown: {said.unknown}")
    if set(said.resources) - set(visible) or (not said.unknown and set(visible) - set(said.resources)):
        wrong.append(f"says {said.resources}, but these exist: {visible}")
    if said.nothing == bool(said.resources or said.unknown):
        wrong.append("says both that something exists and that nothing does, or neither")
    if pending and not (said.may_appear or said.unknown):
        wrong.append(f"{pending} will appear")
    for key, line in said.resources.items():
        if "launch_tpu.sh delete --name prm " not in line or f"--zone {key[1]} " not in line:
            wrong.append(f"no command deletes {key}")
        if visible.get(key) not in FREE and "and costs money" not in line:
            wrong.append(f"{key} costs money")
    secret = "unknown" if "secret" in unknown else "exists" if "jaxprm-prm" in ledger["secrets"] else "absent"
    if said.secret != secret:
        wrong.append(f"secret: says {said.secret}, but it is {secret}")
    zones = {zone for _, zone in said.resources}
    if secret == "exists" and zones and not any(f"--zone {zone} " in said.secret_line for zone in zones):
        wrong.append("no command deletes the secret")  # `delete` in another zone refuses to
    return wrong
