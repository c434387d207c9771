"""Encode, search, compare and map 1,000 files of trained networks whose history is known: `--help` lists the options.

The files are those of `real_networks.py`. Each command of the program runs as a process of its own, is timed, and what
it finds is held against the history: which files are copies, which network was made of which, and which are of one
family.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from real_networks import FAMILY_SIZE, make_collection, summary

from sne_fast.reports.files import write_csv
from sne_fast.reports.machine import machine

Rows = dict[str, dict[str, Any]]


def run(*arguments: Any) -> tuple[str, dict[str, float]]:
    """Run a command of the program; return what it printed, and its seconds."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sne_fast", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {process.stderr}{process.stdout}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.stdout, {"wall_seconds": time.perf_counter() - begun, "cpu_seconds": cpu}


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def network_of(name: str) -> str:
    """Return the path of the file or folder that a command names."""
    path = Path(os.path.abspath(name))
    return str(path.parent if path.name == "model.safetensors.index.json" else path)


def searched(answers: dict[str, list[dict[str, Any]]], rows: Rows) -> dict[str, dict[str, float]]:
    """Return by relation of the queries how often the nearest ones hold the parent, and are of the family."""
    found: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)
    for name, answer in answers.items():
        query = rows[network_of(name)]
        names = [network_of(one["name"]) for one in answer]
        parents = {network_of(parent) for parent in query["parents"]}
        family = rows[names[0]]["family"] == query["family"]
        found[query["relation"]].append((family, names[0] in parents, bool(parents & set(names[:5]))))
    columns = ("family_at_1", "parent_at_1", "parent_in_5")
    return {
        relation: {"queries": len(hits), **{c: sum(hit[k] for hit in hits) / len(hits) for k, c in enumerate(columns)}}
        for relation, hits in sorted(found.items())
    }


def copies(table: list[dict[str, str]], rows: Rows) -> dict[str, Any]:
    """Return how many of the known pairs of copies are in one group, by kind, and how many groups mix families."""
    group: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in table:
        group[network_of(row["network"])].add((row["group"], row["kind"]))
    pairs: dict[str, Counter[str]] = defaultdict(Counter)
    for path, row in rows.items():
        if row["relation"] in ("copy", "permuted", "half", "rounded"):
            of = network_of(row["parents"][0])
            shared = group[path] & group[of]
            pairs[row["relation"]][min((kind for _, kind in shared), default="missed")] += 1
    families: dict[str, set[int]] = defaultdict(set)
    for row in table:
        families[row["group"]].add(rows[network_of(row["network"])]["family"])
    mixed = sum(len(own) > 1 for own in families.values())
    return {
        "groups": len(families),
        "groups_of_several_families": mixed,
        "pairs": {k: dict(v) for k, v in pairs.items()},
    }


def edges(table: list[dict[str, str]], rows: Rows) -> dict[str, Any]:
    """Return how many of the true steps are found with their direction, by relation.

    Copies stand for their original. Steps to permuted networks are left out, which have no near ones.
    """
    same = {path: network_of(row["parents"][0]) for path, row in rows.items() if row["relation"] == "copy"}
    found = {
        (same.get(parent, parent), same.get(child, child))
        for row in table if row["parent"]
        for parent, child in [(network_of(row["parent"]), network_of(row["child"]))]
    }  # fmt: skip
    found -= {(one, other) for one, other in found if one == other}
    steps: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    true = set()
    for path, row in rows.items():
        if row["relation"] in ("base", "copy", "permuted"):
            continue
        for parent in map(network_of, row["parents"]):
            true.add((parent, path))
            counts = steps[row["relation"]]
            counts[0] += 1
            counts[1] += (parent, path) in found
            counts[2] += (path, parent) in found
    columns = ("true", "right", "reversed")
    return {
        "true": len(true), "found": len(found), "right": len(true & found),
        "between_families": sum(rows[one]["family"] != rows[other]["family"] for one, other in found),
        "steps": {name: dict(zip(columns, counts, strict=True)) for name, counts in steps.items()},
    }  # fmt: skip


def changed(pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return the states of the layers of pairs of networks, and the seconds of each comparison."""
    result = {}
    for name, (one, other) in pairs.items():
        out, seconds = run("compare", one, other, "--json")
        result[name] = {"layers": dict(Counter(change["status"] for change in json.loads(out))), **seconds}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of files and results, new or unfinished.")
    parser.add_argument("--families", type=int, default=100, help="Number of families, of ten files each.")
    parser.add_argument("--model", help="Folder of a trained encoder instead of the default of encode.")
    parser.add_argument("--workers", type=int, default=1, help="Processes of encode.")
    parser.add_argument("--note", default="", help="A sentence on the machine, such as that other work ran there.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    networks, vectors, cpu = given.folder / "networks", given.folder / "vectors", time.process_time()
    listed = make_collection(networks, given.families)
    rows = {network_of(row["path"]): row for row in listed}
    result: dict[str, Any] = {"files": len(rows), "files_by": summary(listed), "encode_workers": given.workers}
    result["making"] = {"cpu_seconds": time.process_time() - cpu}
    result["machine"] = {**machine(), "load_average": os.getloadavg()[0], "note": given.note}
    seconds: dict[str, Any] = {}
    result["seconds"] = seconds

    def save() -> None:
        if given.out is not None:
            given.out.write_text(json.dumps(result, indent=2) + "\n")

    model = [] if given.model is None else ["--model", given.model]
    printed, seconds["encode"] = run("encode", networks, "-o", vectors, "--workers", given.workers, *model)
    assert f"{FAMILY_SIZE * given.families:,} networks are done" in printed, printed
    save()

    asked = [path for path, row in rows.items() if row["relation"] != "base"]
    (given.folder / "queries.txt").write_text("\n".join(asked) + "\n")
    printed, seconds["search"] = run("search", vectors, f"@{given.folder / 'queries.txt'}", "-k", 10, "--json")
    result["search"] = searched(json.loads(printed), rows)
    save()

    _, seconds["duplicates"] = run("duplicates", networks, "-o", given.folder / "copies.csv")
    result["duplicates"] = copies(read_table(given.folder / "copies.csv"), rows)
    save()

    _, seconds["lineage"] = run("lineage", networks, "-o", given.folder / "tree.csv")
    result["lineage"] = edges(read_table(given.folder / "tree.csv"), rows)
    save()

    pairs = {}
    for relation in ("tuned", "head", "copy"):
        path = next((path for path, row in rows.items() if row["relation"] == relation), None)
        if path is not None:
            pairs[relation] = (network_of(rows[path]["parents"][0]), path)
    result["compare"] = changed(pairs)
    save()

    columns = ["path", "recipe", "relation", "format", "family"]
    cells = [[path, *(row[column] for column in columns[1:])] for path, row in rows.items()]
    write_csv(given.folder / "known.csv", columns, cells)
    known = ("--table", given.folder / "known.csv", "--colour", "recipe")
    _, seconds["map"] = run("map", vectors, "-o", given.folder / "map.html", *known)
    save()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
