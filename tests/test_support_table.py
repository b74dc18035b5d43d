"""The committed table has a row for each marked test, says what the results say, and no row fails."""

import json

from support_table import CELLS, ELSEWHERE, RESULTS, TABLE, render


def test_the_table_is_that_of_the_tests(request):
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert TABLE.read_text(encoding="utf-8") == render(results)
    assert not [row for row in results["rows"] if "FAILS" in row["verdict"]]
    cells, rows = request.config.stash[CELLS], {(row["section"], row["name"]) for row in results["rows"]}
    assert cells and cells <= rows, "run `make support-table`"
    if not request.config.getoption("file_or_dir"):  # all tests were collected, but for those of other environments
        assert cells == {row for row in rows if row[0] not in ELSEWHERE}, "run `make support-table`"
