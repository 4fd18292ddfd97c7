"""The benchmark measures what it says: same work on both sides, scripted lengths met, exactness beside the speed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import data
import model
import rollout

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench


@pytest.fixture
def small(monkeypatch, tmp_path, capsys):
    """run(name, **settings) -> its JSON lines, on a model of two small layers."""
    build = bench.build_model
    monkeypatch.setattr(bench, "build_model", lambda folder, *_, **__: build(
        folder, 400, dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1],
                          out_hidden_size=64), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])))
    for name, module in (("data", data), ("model", model), ("rollout", rollout)):
        monkeypatch.setattr(bench, name, module, raising=False)

    def run(name, **settings):
        args = dict(repeats=1, dtype="float32", device="cpu", out=None, curve=None, points=["C1"], vllm_python=None,
                    preset="cpu")
        getattr(bench, f"bench_{name}")(SimpleNamespace(**args | settings), Path(tmp_path))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def test_rollout_against_generate(small, monkeypatch):
    """Both sides sample exactly the scripted lengths (asserted inside), and the sampler's log-probs are the trainer's."""
    monkeypatch.setitem(bench.POINTS, "C1", dict(P=2, G=3, new=10, side=56))
    line, = small("rollout")
    assert line["tokens"] == sum(bench.make_lengths(6, 10, 1)) and line["fp32_logp_gap"] < 1e-5
    assert set(line["seconds"]) == {"hf", "hf_again", "flatpo", "hf_nrs"} and line["ratio"] > 0


@pytest.mark.slow
def test_growth_with_completions(small):
    """Both sizes are sampled to their scripted lengths, and the ratio is 16's over 1's."""
    line, = small("growth")
    assert line["ratio"] == pytest.approx(line["seconds"]["G=16"] / line["seconds"]["G=1"], rel=0.02)


def test_training_pass_against_repeated_rows(small, monkeypatch):
    """The two sides compute the same sum and the same gradient; the token bound is that of the lengths used."""
    monkeypatch.setattr(bench, "TRAIN", [dict(G=3, new=8, side=56)])
    line, mean = small("train")
    assert line["logp_sum_gap"] < 1e-3 and line["relative_gradient_gap"] < 1e-5
    P, lengths = line["prompt_tokens"], bench.make_lengths(3, 8, 1)
    assert line["token_bound"] == pytest.approx(3 * (P + 8) / (P + sum(lengths)), abs=1e-3)
    assert mean["geometric_mean_share"] == line["share"]


def test_a_step_against_the_floor(small, monkeypatch):
    """The parts of a step add up, and the scripted lengths are what was decoded."""
    monkeypatch.setitem(bench.FLOOR, "cpu", dict(P=2, G=2, new=8, mean=4, side=56))
    line, = small("floor")
    assert line["step"] == pytest.approx(sum(line["seconds"].values()), abs=2e-3) and line["tokens"] <= 2 * 2 * 8
