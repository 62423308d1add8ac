"""Draws docs/how-it-works.svg: `python docs/how_it_works.py`."""

from pathlib import Path

INK, PALE, ROW, COLUMN, TILE, FORMULA = "#333333", "#f4f4f4", "#4c78a8", "#72b7b2", "#f58518", "#eeca3b"
CELL = 34


def rectangle(x, y, width, height, fill, stroke=INK, dash="", opacity=1.0):
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" fill-opacity="{opacity}" '
        f'stroke="{stroke}"{dashed}/>'
    )


def text(x, y, value, size=14, anchor="middle", weight="normal"):
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{value}</text>'


def arrow(x0, y0, x1, y1):
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{INK}" stroke-width="1.6" marker-end="url(#head)"/>'


def grid(left, top, rows, columns, hot, fill):
    """S as tiles that are never all there: dashed outlines, one tile filled."""
    parts = [
        rectangle(left + j * CELL, top + i * CELL, CELL, CELL, PALE, "#bbbbbb", "3 3")
        for i in range(rows)
        for j in range(columns)
    ]
    i, j = hot
    return [*parts, rectangle(left + j * CELL, top + i * CELL, CELL, CELL, fill)]


def forward(left, top):
    rows, columns = 5, 6
    x, y = left + 60, top + 60
    parts = [text(left + 160, top, "1  statistics: tile by tile, S is never stored", 15, weight="bold")]
    parts += grid(x, y, rows, columns, (1, 2), TILE)
    parts += [rectangle(x - 30, y, 20, rows * CELL, ROW, opacity=0.25), rectangle(x - 30, y + CELL, 20, CELL, ROW)]
    parts += [rectangle(x, y - 30, columns * CELL, 20, COLUMN, opacity=0.25)]
    parts += [rectangle(x + 2 * CELL, y - 30, CELL, 20, COLUMN)]
    parts += [text(x - 40, y + rows * CELL / 2, "X", 16, "end"), text(x + columns * CELL + 22, y - 14, "Yᵀ", 16)]
    end = x + columns * CELL
    parts += [rectangle(end + 14, y, 14, rows * CELL, FORMULA, opacity=0.5)]
    parts += [rectangle(x, y + rows * CELL + 14, columns * CELL, 14, FORMULA, opacity=0.5)]
    parts += [arrow(x + 3 * CELL, y + 1.5 * CELL, end + 11, y + 1.5 * CELL)]
    parts += [arrow(x + 2.5 * CELL, y + 2 * CELL, x + 2.5 * CELL, y + rows * CELL + 11)]
    parts += [text(end + 34, y + rows * CELL / 2 + 5, "B", 13, "start")]
    parts += [
        text(x + columns * CELL / 2, y + rows * CELL + 46, "masked sums, logsumexp, means, extremes: O(B + N)", 13)
    ]
    return parts


def middle(left, top):
    parts = [text(left + 105, top, "2  the loss: O(B) PyTorch", 15, weight="bold")]
    parts += [rectangle(left, top + 60, 210, 150, FORMULA, opacity=0.25)]
    lines = [
        "pull, push = pair_reduce(…)",
        "loss = formula(pull, push)",
        "",
        "autograd gives",
        "∂loss/∂pull, ∂loss/∂push",
    ]
    return parts + [text(left + 105, top + 90 + 24 * i, line, 13) for i, line in enumerate(lines)]


def backward(left, top):
    rows, columns = 5, 6
    x, y = left + 60, top + 60
    parts = [text(left + 170, top, "3  gradients: the tile again, as weights", 15, weight="bold")]
    parts += grid(x, y, rows, columns, (1, 2), TILE)
    parts += [text(x + 2.5 * CELL, y + 1.5 * CELL + 5, "W", 15, weight="bold")]
    parts += [rectangle(x - 34, y, 20, rows * CELL, ROW, opacity=0.25), rectangle(x - 34, y + CELL, 20, CELL, ROW)]
    parts += [rectangle(x, y - 34, columns * CELL, 20, COLUMN, opacity=0.25)]
    parts += [rectangle(x + 2 * CELL, y - 34, CELL, 20, COLUMN)]
    parts += [
        arrow(x + 2 * CELL, y + 1.5 * CELL, x - 11, y + 1.5 * CELL),
        arrow(x + 2.5 * CELL, y + CELL, x + 2.5 * CELL, y - 11),
    ]
    parts += [
        text(x - 24, y + rows * CELL + 20, "dX += W Y", 13),
        text(x + columns * CELL - 40, y - 40, "dYᵀ += Xᵀ W", 13),
    ]
    parts += [text(x + columns * CELL / 2, y + rows * CELL + 46, "fixed order: bitwise repeatable, no atomics", 13)]
    return parts


def main():
    parts = [
        *forward(20, 30),
        *middle(385, 30),
        *backward(620, 30),
        arrow(345, 165, 380, 165),
        arrow(600, 165, 635, 165),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 330" font-family="Helvetica, Arial, sans-serif">\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>\n<rect width="940" height="330" fill="white"/>\n'
    )
    path = Path(__file__).with_name("how-it-works.svg")
    path.write_text(head + f'<g fill="{INK}">\n' + "\n".join(parts) + "\n</g>\n</svg>\n")


if __name__ == "__main__":
    main()
