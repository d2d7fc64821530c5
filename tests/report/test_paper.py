"""Our rows beside the paper's."""

from meteor.report.paper import benchmark_table, efficiency_table


def test_our_cost_stands_below_the_papers(make_variant):
    rows = efficiency_table([make_variant()]).rows
    assert rows[1] == ("LLaVA-Meteor, K = 144 (paper)", "~256", "37.08 M", "13.7 h", "62.4")
    assert rows[-1] == ("meteor", "540.2", "34.98 M", "8 s", "")


def test_only_gqa_is_laid_beside_the_papers_benchmarks(make_variant, make_score):
    table = benchmark_table([make_variant(scores={"gqa": make_score(0.649), "shapes": make_score()})])
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [row[0] for row in table.rows if "(paper)" not in row[0]] == ["meteor"]
    ours = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (ours["GQA"], ours["POPE"]) == ("64.9", "not run")
