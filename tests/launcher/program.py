"""The fake programs: gcloud, curl, systemd, uv and the machine's python, by the name that this file is started as.

`fakes.Cloud` installs copies of it. It is started hundreds of times, without site packages, so it imports little.

The cloud is a ledger: nodes, queued resources and secrets that exist and cost money. A resource has a life, the list of
its states. Time passes when it is described: the state after that is the next of its life, and the last one stays. In
the state ABSENT it is not visible yet, or no longer.
"""

import fcntl
import os
import sys

home = os.environ["FAKE_HOME"]
program, call = os.path.basename(sys.argv[0]), sys.argv[1:]
line = " ".join([program, *call])
KINDS = {"tpu-vm": "nodes", "queued-resources": "queuedResources"}
NODE_OF_QUEUE = {"PROVISIONING": ["CREATING"], "ACTIVE": ["READY"], "SUSPENDING": ["DELETING"]}


class Failed(Exception):
    pass


def update(name, change):
    """Applies a change to a file that holds the repr of a value, alone; returns what the change returns."""
    with open(f"{home}/{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        value = eval(read(f"{home}/{name}"))  # written by these tests
        try:
            return change(value)
        finally:
            with open(f"{home}/{name}.new", "w") as file:
                file.write(repr(value))
            os.rename(file.name, f"{home}/{name}")  # a signal leaves the one or the other


def record_call():
    """Returns how many calls there are now."""
    with open(home + "/calls", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(repr([program, *call]) + "\n")
        file.seek(0)
        return len(file.readlines())


def answer(rules, number):
    for pattern, answers in rules:
        if pattern == f"#{number}" or all(part in line for part in pattern.split(" & ")):
            return answers.pop(0) if len(answers) > 1 else answers[0]
    return None


# ---- storage


def local(url):
    return home + "/bucket/" + url[5:] if url.startswith("gs://") else url


def tree(top):
    return sorted(os.path.relpath(os.path.join(d, f), top) for d, _, names in os.walk(top) for f in names)


def copy(source, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(reader.read())


def read(path):
    with open(path) as file:
        return file.read()


def missing(url):
    raise Failed("(gcloud.storage.ls) One or more URLs matched no objects: " + url)


def storage(verb, *arguments):
    paths = [argument for argument in arguments if not argument.startswith("--")]
    flags = [argument for argument in arguments if argument.startswith("--")]
    if verb == "ls":
        path = local(paths[0])
        urls = [paths[0]] if os.path.isfile(path) else [paths[0] + name for name in tree(path)]
        print("\n".join(urls)) if urls else missing(paths[0])
    elif verb == "cat":
        start = int(next((flag[8:-1] for flag in flags if flag.startswith("--range=")), 0))
        names = [paths[0]]
        if paths[0].endswith("*"):
            names = [paths[0][:-1] + name for name in tree_of_prefix(local(paths[0][:-1]))]
        for name in names or [paths[0]]:
            text = read(local(name)) if os.path.isfile(local(name)) else missing(name)
            sys.stdout.write(f"==> {name} <==\n" * ("--display-url" in flags) + text[start:])
    elif verb == "cp" and "--if-generation-match=0" in flags:
        os.makedirs(os.path.dirname(local(paths[1])), exist_ok=True)
        try:
            file = os.open(local(paths[1]), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise Failed("HTTPError 412: At least one of the pre-conditions you specified did not hold.") from None
        os.write(file, read(local(paths[0])).encode())
    elif verb == "cp" and paths[0] == "-":
        os.makedirs(os.path.dirname(local(paths[1])), exist_ok=True)
        with open(local(paths[1]), "w") as file:
            file.write(sys.stdin.read())
    elif verb == "cp":
        copy(local(paths[0]), local(paths[1])) if os.path.isfile(local(paths[0])) else missing(paths[0])
    elif verb == "rm":
        for path in paths:
            os.remove(local(path)) if os.path.isfile(local(path)) else missing(path)
    elif verb == "rsync":
        source, target = map(local, paths)
        skip = "stages/" if "--exclude=^stages/.*" in flags else "\0"
        for name in tree(source):
            name.startswith(skip) or copy(source + "/" + name, target + "/" + name)
        if "--delete-unmatched-destination-objects" in flags:
            for name in set(tree(target)) - set(tree(source)):
                os.remove(target + "/" + name)


def tree_of_prefix(prefix):
    folder, start = os.path.split(prefix)
    return [name[len(start) :] for name in tree(folder) if name.startswith(start)]


# ---- machines and secrets; the errors are those of gcloud 528 and of the TPU and Secret Manager APIs


def tpus(ledger, group, verb, *arguments):
    flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    place, project = flags["--zone"], flags["--project"]
    if project not in ledger["projects"]:
        raise Failed(
            f"PERMISSION_DENIED: Permission 'tpu.nodes.list' denied on 'projects/{project}' (or it may not exist)."
        )
    if place != "-" and place not in ledger["zones"]:
        raise Failed(f"PERMISSION_DENIED: Location {place} is not found or access is unauthorized.")
    if group == "accelerator-types":
        print(flags["--filter"].removeprefix("type="))
        return
    if place in ledger["unreachable"]:
        raise Failed("UNAVAILABLE: The service is currently unavailable.")
    kind = ledger[KINDS[group]]
    if verb == "list":
        for (zone, name), life in sorted(kind.items()):
            if life[0] != "ABSENT" and place in ("-", zone) and zone not in ledger["unreachable"]:
                print(zone, name, life[0], sep="\t")
        return
    key = (place, arguments[0])
    resource = f"'projects/{project}/locations/{place}/{KINDS[group]}/{arguments[0]}'"
    if verb == "create":
        life = (ledger["lives"][group] or [None])[0]
        if key in ledger["nodes"] or key in kind:
            raise Failed(f"ALREADY_EXISTS: Resource {resource} already exists.")
        if group == "queued-resources" and "--node-id" not in flags:
            raise Failed("argument --node-id: Must be specified.")
        ledger["lives"][group][:1] = []
        default = ["CREATING", "READY"] if group == "tpu-vm" else ["ACCEPTED", "WAITING_FOR_RESOURCES", "ACTIVE"]
        kind[key] = list(life or default)
    elif key not in kind or (kind[key][0] == "ABSENT" and (verb != "describe" or len(kind[key]) == 1)):
        raise Failed(f"NOT_FOUND: Resource {resource} was not found. This command is authenticated as me@example.com.")
    elif verb == "describe":
        kind[key][: len(kind[key]) > 1] = []
        if group == "queued-resources" and (place, arguments[0]) not in ledger["kept_nodes"]:
            follow_queue(ledger, key, kind[key][0])
        if kind[key][0] == "ABSENT":
            if len(kind[key]) == 1:
                del kind[key]
            raise Failed(
                f"NOT_FOUND: Resource {resource} was not found. This command is authenticated as me@example.com."
            )
        elif "failedData" in flags["--format"]:
            print("the reservation is full")
        else:
            print(kind[key][0])
    elif verb == "delete":
        if group == "queued-resources":
            if key in ledger["nodes"] and "--force" not in arguments:
                raise Failed("FAILED_PRECONDITION: the queued resource has nodes")
            if key not in ledger["kept_nodes"]:
                ledger["nodes"].pop(key, None)
        kind[key] = ["DELETING"] * ledger["polls_of_delete"] + ["ABSENT"]
        if len(kind[key]) == 1:
            del kind[key]


def project(ledger, name):
    if name not in ledger["projects"]:
        raise Failed(
            f"[me@example.com] does not have permission to access projects instance [{name}] (or it may not exist)"
        )


def follow_queue(ledger, key, state):
    if state in NODE_OF_QUEUE:
        ledger["nodes"][key] = NODE_OF_QUEUE[state]
    elif state in ("SUSPENDED", "FAILED", "ABSENT"):
        ledger["nodes"].pop(key, None)


def secrets(ledger, verb, *arguments):
    if verb == "versions" and arguments[0] == "access":
        sys.stdout.write(read(home + "/secret"))
        return
    name = arguments[1] if verb == "versions" else arguments[0]
    if verb == "create" and name in ledger["secrets"]:
        raise Failed(f"ALREADY_EXISTS: Secret [projects/1/secrets/{name}] already exists.")
    if verb == "create":
        ledger["secrets"].append(name)
    elif name not in ledger["secrets"]:
        raise Failed(f"NOT_FOUND: Secret [projects/1/secrets/{name}] not found.")
    elif verb == "versions":
        copy(next(flag[12:] for flag in arguments if flag.startswith("--data-file=")), home + "/secret")
    elif verb == "delete":
        ledger["secrets"].remove(name)
    else:
        print("projects/1/secrets/" + name)


def gcloud(group, *arguments):
    if group == "storage" and arguments[0] == "buckets":
        print(arguments[2][5:])
    elif group == "storage":
        storage(*arguments)
    elif group == "secrets":
        update("ledger", lambda ledger: secrets(ledger, *arguments))
    elif arguments[:1] == ("tpus",) and arguments[2] in ("create", "describe", "delete", "list"):
        update("ledger", lambda ledger: tpus(ledger, *arguments[1:]))
    elif group == "projects":
        update("ledger", lambda ledger: project(ledger, arguments[1]))
    elif group == "auth":
        print("me@example.com")


def command(name, *arguments):
    if name == "curl" and "-o" in arguments:
        with open(arguments[arguments.index("-o") + 1], "w") as file:
            file.write('mkdir -p "$UV_INSTALL_DIR" && cp "$FAKE_HOME/bin/uv" "$UV_INSTALL_DIR/uv"')
    elif name == "uv" and arguments[0] == "venv":
        copy(sys.argv[0], arguments[-1] + "/bin/python")
        os.chmod(arguments[-1] + "/bin/python", 0o755)
    elif name == "python" and arguments[0] == "-m":
        with open(home + "/environment", "w") as file:
            file.write(repr(dict(os.environ)))
        if script := os.environ.get("FAKE_RUN"):
            os.execvp("bash", ["bash", "-c", script, *arguments])
    elif name == "gcloud":
        gcloud(*arguments)


def main():
    number = record_call()
    result = update("scenario", lambda rules: answer(rules, number))
    try:
        if result is None or result[3:] == ["after"]:
            command(program, *call)
    except Failed as error:
        sys.exit(f"ERROR: ({line.partition(' --')[0].replace(' ', '.')}) {error}")
    if result is not None:
        sys.stdout.write(result[1])
        sys.stderr.write(result[2])
        sys.stdout.flush()
        sys.stderr.flush()
        if result[0] == "hang":
            import time

            open(home + "/hangs", "w").close()
            time.sleep(60)
        sys.exit(result[0])
