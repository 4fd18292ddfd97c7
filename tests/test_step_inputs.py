"""What a step, an evaluation and a resume are computed from: the right policy, shift, count, groups and number of steps.
Each was once another one's, and no test noticed."""

import math
import shutil
from argparse import Namespace

import pytest
import rank_cases
import torch
from conftest import METHODS, InProcess
from test_runs import flags, grpo, launch, task  # noqa: F401 (fixtures)

import data
import losses
import model
import rollout
import train_grpo


def test_held_out_bco_keeps_its_shift(launch, task, monkeypatch):  # noqa: F811
    """eval/loss/bco_pair was computed without the reward shift. With a rate of 0 every log-ratio is 0, so the loss of a
    pair is -log sigma(-delta) - log sigma(delta)."""
    monkeypatch.setattr(losses, "next_bco_delta", lambda *_: 0.7)
    first, second = launch("train_dpo", "--algo", "bco", "--learning_rate", 0, "--max_steps", 2, "--eval_steps", 1,
                           "--eval_dataset", task / "pairs.jsonl")[0]
    expected = 2 * math.log(1 + math.exp(0.7)) - 0.7
    assert first["bco_delta"] == 0 and second["bco_delta"] == 0.7
    assert first["eval/loss/bco_pair"] == pytest.approx(expected, abs=1e-5)
    assert second["loss/bco_pair"] == pytest.approx(expected, abs=1e-5)


def test_the_held_out_loss_is_weighted(launch, task):  # noqa: F811
    """eval/loss is the sum of the losses times their --loss_weights, as the trained one is: MPO's are 0.8, 0.2 and 1."""
    metrics, _ = launch("train_dpo", "--algo", "mpo", "--max_steps", 1, "--eval_dataset", task / "pairs.jsonl")
    parts = [metrics[0][f"eval/loss/{name}"] for name in ("sigmoid", "bco_pair", "sft")]
    assert metrics[0]["eval/loss"] == pytest.approx(0.8 * parts[0] + 0.2 * parts[1] + parts[2]) != pytest.approx(sum(parts))


@pytest.fixture
def another_rank(monkeypatch):
    """another_rank({metric: (sum, count)}): what a second rank adds to each sum over the ranks."""
    reduce, added = model.all_reduce_sums, {}

    def with_another(sums, *args):
        return {key: (total + added.get(key, (0, 0))[0], n + added.get(key, (0, 0))[1])
                for key, (total, n) in reduce(sums, *args).items()}

    monkeypatch.setattr(model, "all_reduce_sums", with_another)
    return added.update


def test_lcpo_moves_by_the_pairs_of_all_ranks(launch, another_rank):  # noqa: F811
    """The share of right labels followed this rank's pairs: eta differed from rank to rank. The other rank's 12 pairs are
    all wrong here."""
    another_rank({"lcpo_posterior": (0.0, 12)})
    metrics, _ = launch("train_dpo", "--algo", "lcpo", "--max_steps", 2, "--per_device_train_batch_size", 12)
    assert metrics[0]["lcpo_posterior"] == pytest.approx(0.45)  # 12 of 0.9, 12 of 0
    assert metrics[1]["lcpo_eta"] == pytest.approx(0.9 * 0.9 + 0.1 * 0.45)


def test_the_entropy_bonus_is_a_mean_over_all_ranks(launch, task, another_rank):  # noqa: F811
    """The bonus was divided by this rank's tokens, so it grew with the number of ranks. The first step's policy loss is 0:
    what is left is the bonus, over ten times the tokens."""
    (plain,), _ = launch("train_grpo", *grpo(task), "--entropy_coef", 0.5, "--max_steps", 1)
    reduce = model.all_reduce_sums
    tokens = []

    def counted(sums, *args):
        found = reduce(sums, *args)
        if found.keys() == {"n"}:
            tokens.append(found["n"][1])
            found = {"n": (found["n"][0], 10 * found["n"][1])}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "all_reduce_sums", counted)
        (shared,), _ = launch("train_grpo", *grpo(task), "--entropy_coef", 0.5, "--max_steps", 1)
    assert len(tokens) == 1 and plain["loss"] == pytest.approx(-0.5 * plain["entropy"], abs=1e-5)
    assert shared["loss"] == pytest.approx(-0.05 * plain["entropy"], abs=1e-5)


def test_off_policy_mask_asks_the_policy_of_today():
    """The drift of a bad completion was measured with the rollout's old log-probs, which never move."""
    args = train_grpo.parse_args(["--algo", "grpo", "off_policy_mask", "--off_policy_mask_threshold", "0.5"])
    mask, sampled = torch.ones(4, 2, dtype=torch.bool), torch.full((4, 2), -1.0)
    micro = dict(completion_mask=mask, advantages=torch.tensor([-1.0, -1, 1, -1]), sampling_logps=sampled)
    now = sampled - torch.tensor([[1.0], [0], [1], [0.4]])
    old = sampled - torch.tensor([[0.0], [1], [0], [0]])
    keep = train_grpo.weigh_tokens(args, now, old, now, micro)["keep"]
    assert keep.flatten().tolist() == [False, True, True, True]
    assert METHODS["off_policy_mask"].weigh(args, micro, now, old, now).equal(keep)


def test_metrics_are_of_the_groups_that_are_trained(launch, task, monkeypatch):  # noqa: F811
    """After dynamic sampling lengths and cut answers were counted in the last round's completions: here an answer is cut by
    its draw number, and the reward `finished`, which goes with the chosen groups, says so as well."""
    rounds = []

    def sample(policy, prompts, draws, *, num_generations, **_):
        rounds.extend([list(draws)] if num_generations > 1 else [])  # a held-out row gets one answer
        found = rank_cases.fixed_sample(policy, prompts, draws, num_generations=num_generations)
        cut = torch.tensor([(3 * draw + k) % 7 < 3 for draw in draws for k in range(num_generations)])
        return found._replace(truncated=cut)

    monkeypatch.setattr(rollout, "sample", sample)
    metrics, _ = launch("train_grpo", *grpo(task), "--reward_funcs", f"{task / 'rewards.py'}:rare", "finished",
                        "--filter_metric", "rare", "--per_device_train_batch_size", 8, "--dynamic_sampling", 9,
                        "--max_steps", 3, "--eval_dataset", task / "pairs.jsonl")
    assert metrics[-1]["eval/rewards/finished/mean"] == pytest.approx(sum(3 * row % 7 >= 3 for row in range(12)) / 12)
    assert len(rounds) > 3, "else nothing was drawn twice"
    assert len({m["completions/clipped_ratio"] for m in metrics}) > 1
    for m in metrics:
        assert m["completions/clipped_ratio"] == pytest.approx(1 - m["rewards/finished/mean"])


def test_the_entropy_at_the_start_outlives_a_kill(launch, task, tmp_path, monkeypatch):  # noqa: F811
    """A resumed run took the entropy of its own first step for the starting policy's."""
    extra = [*grpo(task, "--algo", "gtpo"), "--per_device_train_batch_size", 4, "--max_steps", 4, "--save_steps", 2,
             "--learning_rate", 0.01, "--model_name_or_path", tmp_path / "start"]
    data.build_tiny_vlm(tmp_path / "start")
    metrics, _ = launch("train_grpo", *extra)
    known, policy_loss = [], losses.policy_loss
    monkeypatch.setattr(losses, "policy_loss", lambda *a, **k: (known.append(k["initial_entropy"]), policy_loss(*a, **k))[1])
    shutil.rmtree(tmp_path / "run0" / "final"), shutil.rmtree(tmp_path / "run0" / "checkpoints" / "step_4")
    (tmp_path / "run0" / "status.json").unlink()
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    train_grpo.main([*flags(task, *extra), "--output_dir", str(tmp_path / "run0")])
    assert known == [metrics[0]["entropy"]] * 2 and metrics[0]["entropy"] != metrics[2]["entropy"]


def test_one_warmup_step_is_one_step():
    """--warmup_steps 1 read as a share makes all of the run a warm-up; 0.5 is a share."""
    def rates(warmup):
        args = Namespace(learning_rate=1.0, warmup_steps=warmup, lr_scheduler_type="constant")
        return [model.learning_rate_at(args, step, 10) for step in range(10)]

    assert rates(1.0) == [0.0] + [1.0] * 9
    assert rates(0.5) == [0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 5


def test_each_dataset_has_its_own_order():
    """All datasets of a mixture were drawn in one permutation: the n-th row of one always came with the n-th of another."""
    plan = list(data.Plan([40, 40], 80, 3, shares=[1, 1]))
    first, second = [i for i in plan if i < 40], [i - 40 for i in plan if i >= 40]
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert sum(a == b for a, b in zip(first, second)) < 10
