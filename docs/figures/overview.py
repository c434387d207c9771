"""Draw overview.svg: weights -> chunks -> tensors -> layers -> network -> z.

python docs/figures/overview.py
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 1040, 356
TOP, ROW, CELL = 92, 32, 13
CHUNK = 8
BLUE, ORANGE, GREY = ("#0072b2", "#cfe3f1"), ("#d55e00", "#f9dfcd"), ("#444444", "#e6e6e6")
# Tensors of the drawn network: name, rows and columns of the drawn matrix, colours of its layer.
TENSORS = (
    ("weight", 4, 5, BLUE),
    ("bias", 1, 4, BLUE),
    ("weight", 3, 4, ORANGE),
    ("bias", 1, 3, ORANGE),
)
LAYERS = ((0, 1), (2, 3))
COLUMNS = {"weights": 92, "chunks": 270, "chunk": 468, "tensor": 608, "layer": 748, "network": 888}
VECTOR = 5


def rectangle(x: float, y: float, colours: tuple[str, str], side: float = CELL) -> str:
    stroke, fill = colours
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, size: int = 13, colour: str = "#222222", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def line(x0: float, y0: float, x1: float, y1: float, colour: str = "#888888") -> str:
    middle = (x0 + x1) / 2
    return f'<path d="M{x0:.1f} {y0:.1f} C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}" ' \
           f'fill="none" stroke="{colour}"/>'  # fmt: skip


def vector(x: float, y: float, colours: tuple[str, str]) -> list[str]:
    side = 10
    return [rectangle(x - VECTOR * side / 2 + i * side, y - side / 2, colours, side) for i in range(VECTOR)]


def draw() -> str:
    parts: list[str] = []
    chunk_rows: list[list[float]] = []
    row = 0
    for _, rows, columns, colours in TENSORS:  # the chunks of every tensor, one below the other
        lengths = [min(CHUNK, rows * columns - start) for start in range(0, rows * columns, CHUNK)]
        chunk_rows.append([])
        for length in lengths:
            y = TOP + row * ROW
            chunk_rows[-1].append(y)
            left = COLUMNS["chunks"] - CHUNK * CELL / 2
            parts += [rectangle(left + i * CELL, y - CELL / 2, colours) for i in range(length)]
            parts.append(line(left + CHUNK * CELL + 8, y, COLUMNS["chunk"] - 30, y))
            parts += vector(COLUMNS["chunk"], y, colours)
            row += 1
    tensor_rows = [sum(ys) / len(ys) for ys in chunk_rows]
    for (name, rows, columns, colours), y, chunks in zip(TENSORS, tensor_rows, chunk_rows, strict=True):
        left, top = COLUMNS["weights"] - columns * CELL / 2, y - rows * CELL / 2
        parts += [rectangle(left + j * CELL, top + i * CELL, colours) for i in range(rows) for j in range(columns)]
        parts.append(text(COLUMNS["weights"] - columns * CELL / 2 - 26, y + 4, name, 11, colours[0]))
        for chunk in chunks:
            parts.append(line(left + columns * CELL + 6, y, COLUMNS["chunks"] - CHUNK * CELL / 2 - 6, chunk))
            parts.append(line(COLUMNS["chunk"] + 30, chunk, COLUMNS["tensor"] - 30, y))
        parts += vector(COLUMNS["tensor"], y, colours)
    middle = sum(tensor_rows) / len(tensor_rows)
    for members in LAYERS:
        y = sum(tensor_rows[t] for t in members) / len(members)
        parts += [line(COLUMNS["tensor"] + 30, tensor_rows[t], COLUMNS["layer"] - 30, y) for t in members]
        parts += vector(COLUMNS["layer"], y, TENSORS[members[0]][3])
        parts.append(line(COLUMNS["layer"] + 30, y, COLUMNS["network"] - 30, middle))
    parts += vector(COLUMNS["network"], middle, GREY)
    parts.append(line(COLUMNS["network"] + 30, middle, COLUMNS["network"] + 62, middle))
    parts.append(text(COLUMNS["network"] + 98, middle + 5, "prediction", 13))
    parts.append(text(COLUMNS["network"], middle - 14, "z", 15, weight="bold"))
    heads = (
        ("weights", "weights", "any shapes"),
        ("chunks", "chunks", "at most c scalars"),
        ("chunk", "chunk vectors", ""),
        ("tensor", "tensor vectors", ""),
        ("layer", "layer vectors", ""),
        ("network", "network", ""),
    )
    for column, head, below in heads:
        parts.append(text(COLUMNS[column], 30, head, 13, weight="bold"))
        parts.append(text(COLUMNS[column], 48, below, 11, "#666666"))
    bottom = TOP + row * ROW + 10
    stages = (
        (("weights", "chunks"), "cut and scale", "gather_chunks"),
        (("chunks", "chunk"), "4 SAB, PMA", "chunk_encode"),
        (("chunk", "tensor"), "2 SAB, PMA", ""),
        (("tensor", "layer"), "2 SAB, PMA", "set_attention, segment_pool"),
        (("layer", "network"), "2 SAB, PMA", ""),
    )
    for (a, b), what, op in stages:
        x = (COLUMNS[a] + COLUMNS[b]) / 2
        parts.append(text(x, bottom, what, 12))
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" font-size="11" fill="#666666" text-anchor="middle" '
            f'font-family="monospace">{op}</text>'
        )
    parts.append(text(COLUMNS["network"] + 60, bottom, "MLP head", 12))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="SNE: weights are cut into chunks, and '
        f'chunks are encoded and pooled to tensors, layers and one vector of the network">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("overview.svg").write_text(draw(), encoding="utf-8")
