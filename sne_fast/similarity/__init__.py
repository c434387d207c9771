"""Search among many networks: nearest ones, a map, duplicates, what was made of what, and what changed between two.

`nearest` compares encodings, which find networks whatever order their hidden units are in, and `layout` places them in
the plane. `sketch` reads a network once and keeps a few numbers of every tensor, from which `find_duplicates` and
`lineage` know how far the weights of two networks are apart. `compare` reads two networks and says what changed in
every layer.

Example:
    >>> from sne_fast import similarity
    >>> nets = [torch.nn.Linear(4, 3) for _ in range(3)]
    >>> distances, places = similarity.nearest(encoder(nets), encoder(nets[:1]), k=1)
    >>> places.tolist()
    [[0]]
"""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .comparing import LayerChange, compare
    from .distances import sketch_distances
    from .duplicates import Duplicates, find_duplicates
    from .edges import Edge
    from .layouts import layout
    from .pages import map_page
    from .searching import nearest
    from .sketches import NetworkSketch, sketch
    from .trees import Lineage, lineage
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            ".comparing": ["LayerChange", "compare"],
            ".distances": ["sketch_distances"],
            ".duplicates": ["Duplicates", "find_duplicates"],
            ".edges": ["Edge"],
            ".layouts": ["layout"],
            ".pages": ["map_page"],
            ".searching": ["nearest"],
            ".sketches": ["NetworkSketch", "sketch"],
            ".trees": ["Lineage", "lineage"],
        },
    )

__all__ = [
    "Duplicates",
    "Edge",
    "LayerChange",
    "Lineage",
    "NetworkSketch",
    "compare",
    "find_duplicates",
    "layout",
    "lineage",
    "map_page",
    "nearest",
    "sketch",
    "sketch_distances",
]
