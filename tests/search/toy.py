"""A search from outside the package: it takes the first of its draws at every step, whatever the scores are."""

from jaxprm.search.methods import SearchMethod
from jaxprm.search.tree import commit, expand, new_trees


def take_first(request):
    runner, draws, temperature = request.runner, request.spec.actions, request.settings.temperature
    trees = new_trees(request.tasks, runner)
    for _ in range(request.max_rounds):
        open_trees = [tree for tree in trees if not tree.finished]
        if not open_trees:
            break
        parents = [(tree, tree.frontier[0]) for tree in open_trees]
        _, candidates = expand(parents, draws, runner, request.policy, request.scorer, temperature)
        for tree, nodes in zip(open_trees, candidates, strict=True):
            tree.frontier = nodes[:1]
            tree.rounds += 1
        commit([nodes[0] for nodes in candidates], runner)
    return trees


FIRST = SearchMethod(
    "first",
    take_first,
    label="first of {} draws",
    card="first of {} draws at every step",
    parse_sizes=lambda actions: (1, actions),
    size=lambda spec: str(spec.actions),
)
SAME_KIND = SearchMethod("first", take_first)
NOT_A_SEARCH = 3
