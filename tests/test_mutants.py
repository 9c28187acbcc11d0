"""mutants.txt and the mistakes of the null GPU fit today's script: each text stands there once."""

import runpy
from collections import Counter

import pytest
from conftest import ROOT
from mutants import TESTS, mutants, mutated, places, section_of

TEXT = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_each_mutant_changes_one_place_and_parses():
    changed = {}
    for name, right, wrong in mutants():
        assert len(places(TEXT, right)) == 1, name
        assert (text := mutated(TEXT, right, wrong)) != TEXT, name
        assert changed.setdefault(text, name) == name, f"{name} and {changed[text]} are the same mistake"


def test_each_mistake_on_the_null_gpu_changes_one_place():
    for name, (right, wrong, _) in runpy.run_path(str(ROOT / "tests/nullgpu/planted.py"))["PLANTED"].items():
        assert TEXT.count(right) == 1 and right != wrong, name


def test_names_differ_and_every_section_has_mutants_and_tests():
    assert max(Counter(name for name, *_ in mutants()).values()) == 1
    assert {section_of(TEXT, right) for _, right, _ in mutants()} == TESTS.keys()
    assert all((ROOT / f"tests/test_{name}.py").is_file() for names in TESTS.values() for name in names.split())


def test_a_mutant_survives_another_layout_and_new_comments():
    right, wrong = "call(a, b[0]) if x else y", "call(a, b[1]) if x else y"
    for text in ("z = call(a, b[0]) if x else y", "call(\n    a,  # first\n    b[0],\n) if x else y"):
        assert len(places(text, right)) == 1 and mutated(text, right, wrong).endswith("call(a, b[1]) if x else y")
    assert not places("left = size_of", "left = size")
    assert not places("recall(a, b[0]) if x else y", right) and not places("call(a, b[0]) if xelse y", right)
    with pytest.raises(SyntaxError):
        mutated("call(a)", "call(a)", "call(a")
