"""The tables of mutants and of the null GPU's mistakes fit today's script: each text stands there once."""

import runpy
from collections import Counter

from conftest import ROOT
from mutants import TESTS, mutants, section_of

TEXT = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_each_mutant_changes_one_place():
    for name, right, wrong in mutants():
        assert TEXT.count(right) == 1 and right != wrong, name


def test_each_mistake_on_the_null_gpu_changes_one_place():
    for name, (right, wrong, _) in runpy.run_path(str(ROOT / "tests/nullgpu/planted.py"))["PLANTED"].items():
        assert TEXT.count(right) == 1 and right != wrong, name


def test_names_differ_and_every_section_has_mutants_and_tests():
    assert max(Counter(name for name, *_ in mutants()).values()) == 1
    assert {section_of(TEXT, TEXT.index(right)) for _, right, _ in mutants()} == TESTS.keys()
    assert all((ROOT / f"tests/test_{name}.py").is_file() for names in TESTS.values() for name in names.split())
