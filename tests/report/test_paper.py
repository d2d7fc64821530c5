"""Our rows beside the paper's."""

from meteor.report.paper import BENCHMARKS, paper_rows, paper_table


def test_our_cost_stands_below_the_papers(make_variant):
    table = paper_table(4, [make_variant()])
    assert table.rows[1] == ("LLaVA-Meteor (paper)", "144", "37.08 M", "13.7 h", "29.1", "62.4")
    assert table.rows[-1] == ("meteor", "540.2", "34.98 M", "8 s", "not recorded", "not run")
    assert table.theirs == len(table.rows) - 1


def test_a_set_of_a_benchmarks_own_metric_stands_in_its_column_and_others_in_columns_of_their_own(
    make_variant, make_score
):
    table = paper_table(
        1, [make_variant(scores={"my_gqa": make_score(0.649, column="GQA"), "shapes": make_score(0.5)})]
    )
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [row[0] for row in table.rows[table.theirs :]] == ["meteor"]
    ours = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (ours["GQA"], ours["POPE"], ours["shapes"]) == ("64.9", "", "50.0")


def test_the_papers_rows_are_those_printed_with_all_benchmarks_as_columns():
    rows = paper_rows()
    assert [sum(row["table"] == str(number) for row in rows) for number in (1, 2, 3)] == [20, 2, 3]
    meteor = next(row for row in rows if row["model"] == "LLaVA-Meteor K=144")
    assert [meteor[name] for name in (*BENCHMARKS, "avg")] == (
        ["69.9", "64.2", "59.0", "39.2", "64.9", "82.4", "59.3", "69.4", "44.7", "37.5", "89.9", "67.7", "62.4"]
    )
