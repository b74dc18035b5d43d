"""The committed table of docs/support.md has the rows that the tests have, and no failed one."""

from support_table import CELLS, TABLE, rows_of_table


def test_the_table_is_that_of_the_tests(request):
    cells, rows = request.config.stash[CELLS], set(rows_of_table())
    assert cells <= rows, "run `make support-table`"
    assert rows
    if not request.config.getoption("file_or_dir"):  # all tests were collected
        assert cells == rows, "run `make support-table`"


def test_no_row_fails():
    text = TABLE.read_text(encoding="utf-8")
    assert "FAILS" not in text and "not run here" not in text
