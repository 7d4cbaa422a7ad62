"""A small table writer: aligned Markdown, which also reads well as plain text."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """An aligned Markdown table.

    Args:
        header: column titles.
        rows: cells as text, one sequence per row.
        left: indices of left-aligned columns; the others are right-aligned.

    Returns:
        The table, without a final newline.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return f"| {' | '.join(aligned)} |"

    rule = "|".join(
        f"{'-' * (width + 2)}" if column in left else f"{'-' * (width + 1)}:"
        for column, width in enumerate(widths)
    )
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])
