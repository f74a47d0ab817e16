"""Tables that few runs have: equal budgets, other searches and aggregations."""

import re

from jaxprm.report import build_report


def rows_of(page: str, caption: str) -> list[list[str]]:
    """The cells of a table as plain text."""
    matching = next(table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if caption in table)
    rows = re.findall(r"<tr.*?</tr>", matching, re.DOTALL)[1:]
    cells = [re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_a_search_is_in_one_row_with_the_best_of_n_of_the_same_cost(results, leave):
    estimate = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}
    row = {"label": "orm", "at": "beam 4x4", "unit": "tokens", "budget": 900.0, "n": 6.25, "capped": False}
    row |= {"searched": estimate(0.5), "best_of_n": estimate(0.4), "difference": estimate(0.1)}
    capped = row | {"label": "pvm", "unit": "flops", "n": 16.0, "capped": True}
    page = build_report(leave(results | {"budget": {"equal": [row, capped]}})).read_text()
    first, second = rows_of(page, "at equal cost")
    assert first[1:3] == ["tokens", "6.2"] and first[0].startswith("ORM")
    assert [cell.split()[0] for cell in first[3:]] == ["50.0", "40.0", "+10.0"]
    assert second[1:3] == ["flops", "more than 16.0"]


def test_a_budget_that_never_suffices_says_so(results, leave):
    needed = [
        {"a": "agentprm", "b": "orm", "at": 16, "mean": 4.0, "low": 1.5, "high": 8.0, "n": 9, "reached": 1.0},
        {"a": "orm", "b": "agentprm", "at": 16, "mean": 0.0, "low": 0.0, "high": 0.9, "n": 9, "reached": 0.2},
    ]
    page = build_report(leave(results | {"budget": {"needed": needed}})).read_text()
    first, second = rows_of(page, "less budget")
    assert first == ["AgentPRM", "ORM best of 16", "4.00 [1.50, 8.00]"]
    assert second == ["ORM", "AgentPRM best of 16", "does not [0.00, 0.90]"]


def test_other_searches_and_aggregations_have_their_tables(results, leave):
    estimate = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}
    results["methods"]["orm"] |= {
        "best_of_n_mean": {"2": estimate(0.3), "16": estimate(0.4)},
        "best_of_n_min": {"16": estimate(0.2)},
        "mcts": {"8x4": estimate(0.6)},
    }
    page = build_report(leave(results)).read_text()
    aggregated = rows_of(page, "other scores")
    assert [row[0] for row in aggregated] == ["ORM mean", "ORM min"]
    assert [[cell.split()[0] for cell in row[1:]] for row in aggregated] == [["30.0", "40.0"], ["–", "20.0"]]
    assert [[*row[:1], row[1].split()[0]] for row in rows_of(page, "Other searches")] == [["ORM mcts", "60.0"]]
    assert "Other searches: tree search simulations×actions<" in page


def test_a_search_from_outside_the_package_is_in_the_caption_of_its_table(results, leave):
    estimate = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}
    results["methods"]["orm"] |= {"diverse": {"2x3": estimate(0.5)}, "paths": {"4x1": estimate(0.6)}}
    results["searches"] = {"paths": {"label": "{} independent paths"}, "unused": {"label": "unused {}"}}
    page = build_report(leave(results)).read_text()
    assert "Other searches: diverse beam paths×actions, N independent paths (paths)<" in page
    assert [row[0] for row in rows_of(page, "Other searches")] == ["ORM diverse", "ORM paths"]


def test_a_run_without_budgets_has_no_such_table(results, leave):
    page = build_report(leave(results)).read_text()
    assert "at equal cost" not in page and "less budget" not in page and "Other searches" not in page
