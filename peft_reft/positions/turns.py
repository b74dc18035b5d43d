"""Find the answers of one document in its token ids, by the marks of its chat template. Plain Python, for serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def answers_of(
    ids: Sequence[int],
    response: Sequence[Sequence[int]],
    instruction: Sequence[Sequence[int]],
    given: int | None = None,
) -> list[tuple[int, int]]:
    """Find the answers of one document; all other tokens are prompt.

    An answer starts behind a response template. It ends where an instruction template begins, or with the document.
    Messages of the assistant that follow each other are one answer. An answer that starts where an instruction
    template begins is empty. If several templates match at one column, the longest counts. So a header can be given
    with its tail and without: the tail belongs to the prompt if its tokens follow the header, and to the answer if
    they merged with the answer's first token.

    Args:
        ids: token ids of the document, without padding.
        response: headers behind which an answer starts, as token ids.
        instruction: headers at which an answer has ended, as token ids.
        given: how many tokens `generate` or an engine was given. Every token behind them is answer.

    Returns:
        (start, end) of each answer, in order: `ids[start:end]` is the answer.

    Example:
        >>> user, assistant = [7, 8], [7, 9]
        >>> answers_of([7, 8, 1, 2, 7, 9, 3, 4, 7, 8, 5], [assistant], [user])
        [(6, 8)]
        >>> answers_of([7, 8, 1, 2], [assistant], [user], given=4)
        [(4, 4)]
    """
    starts = {behind for _, behind in _headers(ids, response)}
    ends = {first for first, _ in _headers(ids, instruction) if given is None or first < given}
    if given is not None and given <= len(ids):
        starts.add(given)
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for column in sorted(starts | ends):
        if start is None and column in starts:
            start = column
            if column in ends:
                spans.append((column, column))
                start = None
        elif start is not None and column in ends:
            spans.append((start, column))
            start = None
    if start is not None:
        spans.append((start, len(ids)))
    return spans


def _headers(ids: Sequence[int], templates: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The first column of each occurrence, and the column behind it; the longest if several begin at one column."""
    by_first: dict[int, list[list[int]]] = {}
    for template in sorted(map(list, templates), key=len, reverse=True):
        if template:
            by_first.setdefault(template[0], []).append(template)
    for column, token in enumerate(ids):
        for template in by_first.get(token, ()):
            if list(ids[column : column + len(template)]) == template:
                yield column, column + len(template)
                break
