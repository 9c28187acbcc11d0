"""The rows of VARIANTS against the table of published settings, option by option."""

from typing import get_type_hints

import pytest
from published_settings import published

import train_gpt as t

ROWS, HINTS = published(), get_type_hints(t.Config)


def differs(value, text, kind):
    """Whether a setting differs from the table; numbers are compared to six digits, because a published base is rounded."""
    wanted = t.parse(kind, "", "" if text == "()" else text)
    return value != (pytest.approx(wanted, rel=1e-6) if kind is float else wanted)


def test_the_table_has_all_options_of_these_groups_and_all_rows():
    options = {*t.Config().group("model", "training", "quantization", "evaluation")} - {"variant"}
    for row, settings in ROWS.items():
        missing, unknown = options - settings.keys(), settings.keys() - options
        assert not missing, f"tests/published_settings.py lacks {', '.join(sorted(missing))} for {row}"
        assert not unknown, f"tests/published_settings.py has {', '.join(sorted(unknown))} for {row}, which are not options of the script"
    assert {*ROWS} == t.VARIANTS.keys()


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_its_published_settings(row):
    cfg = t.Config.from_env({"VARIANT": row})
    wrong = [f"{row} {option.upper()}: table {text}, script {getattr(cfg, option)}" for option, text in ROWS[row].items()
             if option in HINTS and differs(getattr(cfg, option), text, HINTS[option])]
    assert not wrong, "; ".join(wrong)


def test_the_data_of_each_row_has_its_vocabulary():
    for row in ROWS:
        cfg = t.Config.from_env({"VARIANT": row})
        assert str(cfg.vocab_size) in cfg.data_path and str(cfg.vocab_size) in cfg.tokenizer_path, row
