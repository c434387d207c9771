"""Scores of the benchmark of a collection: what commands find, held against the history of the files."""

import pytest
from real_collection import copies, edges, searched

RELATIONS = {  # file: relation and parents
    "base": ("base", []), "copy": ("copy", ["base"]), "tuned": ("tuned", ["base"]), "sibling": ("sibling", ["base"]),
    "merged": ("merged", ["tuned", "sibling"]), "permuted": ("permuted", ["tuned"]), "half": ("half", ["tuned"]),
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    found = {
        str(tmp_path / name): {"family": 0, "relation": relation, "parents": [str(tmp_path / p) for p in parents]}
        for name, (relation, parents) in RELATIONS.items()
    }
    return {**found, str(tmp_path / "other"): {"family": 1, "relation": "base", "parents": []}}


def test_edges_count_copies_as_their_original(rows, tmp_path):
    steps = [
        ("copy", "tuned"),
        ("sibling", "base"),
        ("base", "copy"),
        ("tuned", "merged"),
        ("tuned", "half"),
        ("", "other"),
    ]
    table = [{"parent": one and str(tmp_path / one), "child": str(tmp_path / other)} for one, other in steps]
    found = edges(table, rows)
    assert (found["true"], found["found"], found["right"], found["between_families"]) == (5, 4, 3, 0)
    assert found["steps"]["tuned"] == {"true": 1, "right": 1, "reversed": 0}
    assert found["steps"]["sibling"] == {"true": 1, "right": 0, "reversed": 1}
    assert found["steps"]["merged"] == {"true": 2, "right": 1, "reversed": 0}


def test_copies_and_groups_that_mix_families(rows, tmp_path):
    groups = [("1", "exact", "base"), ("1", "exact", "copy"), ("2", "near", "tuned"), ("2", "near", "other"),
              ("3", "reordered", "tuned"), ("3", "reordered", "permuted")]  # fmt: skip
    table = [{"group": group, "kind": kind, "network": str(tmp_path / name)} for group, kind, name in groups]
    found = copies(table, rows)
    assert found["groups"] == 3 and found["groups_of_several_families"] == 1
    assert found["pairs"] == {"copy": {"exact": 1}, "permuted": {"reordered": 1}, "half": {"missed": 1}}


def test_searches_by_relation_and_folders_named_by_their_index(rows, tmp_path):
    near = {"permuted": ["base", "tuned/model.safetensors.index.json"], "half": ["other", "tuned"]}
    answers = {str(tmp_path / q): [{"name": str(tmp_path / name)} for name in names] for q, names in near.items()}
    found = searched(answers, rows)
    assert found["permuted"] == {"queries": 1, "family_at_1": 1, "parent_at_1": 0, "parent_in_5": 1}
    assert found["half"] == {"queries": 1, "family_at_1": 0, "parent_at_1": 0, "parent_in_5": 1}
