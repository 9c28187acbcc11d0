"""tools.model.quantization on the checkpoint of a tiny run."""

import dataclasses

import pytest
import torch
from conftest import make_model, run
from helpers.smoke import SMOKE

import train_gpt as t
from tools.model import quantization


@pytest.fixture(scope="module")
def study(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = run(SMOKE | dataset | dict(VAL_MAX_TOKENS="700", OUTPUT_DIR=str(folder), CHECKPOINT_EVERY="20", TTT_EPOCHS="0"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA_PATH", "TOKENIZER_PATH"):
            patch.setenv(name, dataset[name])
        yield quantization.Study(folder / "final_model.average.ptz", 700, 2), done.stdout


def test_it_starts_from_the_averaged_weights_and_leaves_them_alone(study):
    study, log = study
    averaged = float(log.split("DIAGNOSTIC post_ema")[1].split("val_bpb:")[1].split()[0])
    assert study.base == pytest.approx(averaged, abs=1e-4)
    before = {n: w.clone() for n, w in study.weights.items()}
    line = quantization.row(study, "row maximum, int8").split("|")
    assert abs(float(line[-2])) < 5 and 7 < float(line[-4]) < 8 and int(line[2].replace(",", "")) > 10_000
    assert all((w == before[n]).all() for n, w in study.weights.items())
    assert float(quantization.row(study, "row maximum, int4").split("|")[-2]) > abs(float(line[-2]))
    assert study.score(study.weights) == study.base


def test_equal_bytes_are_equal(study):
    study, _ = study
    size = study.size(t.quantize(study.weights, study.plans("SDClip 12.85, GPTQ (#1812)")), "rans")
    (found, gap), = quantization.at_bytes(study, "SDClip 12.85, GPTQ (#1812)", [round(0.95 * size)], "rans")
    assert found == pytest.approx(0.95 * size, rel=0.02)
    assert abs(gap) < 1


def test_a_part_is_coded_alone_and_counted_alone(study):
    study, _ = study
    label, sizes = "row maximum, int8", {}
    for part, prefix in quantization.PARTS.items():
        plans = study.plans(label, part)
        tensors = t.quantize(study.weights, plans)
        back = t.dequantize(tensors)
        changed = {n for n, w in study.weights.items() if w.dim() == 2 and not torch.equal(back[n], w.half().float())}
        assert changed == set(plans) and all(n.startswith(prefix) for n in plans)
        sizes[part] = study.size(tensors, "rans", part)
        assert sizes[part] == study.size({n: v for n, v in tensors.items() if n.startswith(prefix)}, "rans")
    assert max(sizes["matrices"], sizes["token table"]) < sizes["all"] < sizes["matrices"] + sizes["token table"] + 20_000
    for part, whole in sizes.items():
        (size, gap), = quantization.at_bytes(study, label, [round(0.9 * whole)], "rans", part)
        assert size == pytest.approx(0.9 * whole, rel=0.05) and abs(gap) < 1


def test_costs_and_scores_of_a_looped_checkpoint_are_those_of_its_loops(dataset, tmp_path, monkeypatch):
    cfg = t.Config.from_env(SMOKE | dataset | dict(OUTPUT_DIR=str(tmp_path), VAL_MAX_TOKENS="200", NUM_LOOPS="2", LOOP_START="1", LOOP_END="2"))
    path, model = tmp_path / "looped.ptz", make_model(cfg)
    path.write_bytes(t.pack({name: p.detach() for name, p in model.named_parameters()}, True, dataclasses.replace(cfg, zstd_level=3)))
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.setenv(name, dataset[name])
    monkeypatch.setenv("DTYPE", "fp32")
    study, inputs = quantization.Study(path, 200, 1), []
    with torch.no_grad():
        assert study.base == pytest.approx(study.scorer.evaluate_windows(lambda ids, targets: model(ids, targets, True)).bpb, abs=1e-6)
        assert study.base != pytest.approx(study.scorer.evaluate_windows(lambda ids, targets: model(ids, targets, False)).bpb, abs=1e-6)
    first = t.Batches(t.TokenStream(t.find_shards(study.cfg, "train"), 384), study.cfg, t.Ranks()).load(0, 32, 1)[0][0]
    block = model.blocks[1].mlp.fc
    block.output_hook = lambda x, y: inputs.append(x.detach().flatten(0, -2)) or y
    model(first, first, True)
    assert len(inputs) == 3  # passes
    seen = torch.cat(inputs)
    torch.testing.assert_close(study.costs["blocks.1.mlp.fc.weight"].inputs, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)
