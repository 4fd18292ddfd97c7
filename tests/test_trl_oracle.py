"""losses.py against what TRL's own code gives: values and gradients stored by make_trl_goldens.py, and TRL itself
where it is installed. Padding is nan here and was 0 there."""

import functools
import inspect
import json
import math

import make_trl_goldens
import pytest
import torch
from conftest import METHODS, preference_losses

import losses

GOLDENS = json.loads(make_trl_goldens.PATH.read_text())
INPUTS, CASES = GOLDENS["inputs"], GOLDENS["cases"]
DIFFERING = {"differs", "micro_batches", "clamp", "equal_rewards", "rloo_empty"}  # groups of section (c)
# In fp32 TRL's CPU and this one round terms near 1 that cancel: 4 roundings of these, and 40 of what is left.
TOLERANCE = {"float64": dict(rtol=1e-9, atol=1e-12), "float32": dict(rtol=5e-6, atol=5e-7)}


def options(case):
    """The case's options over the defaults of the function that made it, and so of TRL's side."""
    parameters = inspect.signature(make_trl_goldens.RUNNERS[case["runner"]]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | case["options"]


def select(runner, *groups):
    """Parametrize over the cases of a runner, all groups but DIFFERING where none is named."""
    chosen = [c for c in CASES if c["runner"] == runner
              and (c["group"] in groups if groups else c["group"] not in DIFFERING)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=[f"{c['group']}:{c['id']}" for c in chosen])


def find(group, inputs, **options):
    """The one stored case of exactly these options."""
    found = [c for c in CASES if (c["group"], c["inputs"]) == (group, inputs)
             and {k: v for k, v in c["options"].items() if k != "metrics"} == options]
    assert len(found) == 1
    return found[0]


def in_dtype(function):
    """Run a function of a case with the case's dtype as torch's default, as TRL did."""
    @functools.wraps(function)
    def wrapped(case, *args, **kwargs):
        with make_trl_goldens.default_dtype(case["dtype"]):
            return function(case, *args, **kwargs)
    return wrapped


def padded(ragged, fill=math.nan):
    """Ragged rows -> (values, mask), one column wider than the longest; `fill` where a row has no number."""
    width = max(map(len, ragged)) + 1
    rows = [[*row, *[None] * (width - len(row))] for row in ragged]
    return (torch.tensor([[fill if x is None else x for x in row] for row in rows]),
            torch.tensor([[x is not None for x in row] for row in rows]))


def leaf(ragged):
    values, mask = padded(ragged)
    return values.requires_grad_(), mask


def as_rows(gradient, mask):
    """The gradient's values where mask, row by row; elsewhere it must be exactly 0, nan or not."""
    assert (gradient[~mask] == 0).all()
    return [row[keep].tolist() for row, keep in zip(gradient, mask)]


def flat(x):
    if isinstance(x, dict):
        return [number for key in sorted(x) for number in flat(x[key])]
    return [number for part in x for number in flat(part)] if isinstance(x, list) else [x]


def assert_close(ours, theirs, **tolerance):
    torch.testing.assert_close(torch.tensor(flat(ours), dtype=torch.float64),
                               torch.tensor(flat(theirs), dtype=torch.float64), **tolerance)


def assert_equals_golden(case, result):
    assert_close(result["value"], case["value"], **TOLERANCE[case["dtype"]])
    for name, rows in case.get("grad", {}).items():
        assert_close(result["grad"][name], rows, **TOLERANCE[case["dtype"]])
    for name, value in case.get("metrics", {}).items():  # 1e-6: TRL takes some of them in fp32
        assert_close(result["metrics"][name], value, rtol=1e-6, atol=1e-6)


# --- the same with losses.py


@in_dtype
def our_preference(case, *, bco_shift=0.0, nll_normalization="token", **overrides):
    o, inputs = options(case) | overrides, INPUTS[case["inputs"]]
    chosen, chosen_mask = leaf(inputs["chosen"])
    rejected, rejected_mask = leaf(inputs["rejected"])
    weights = None
    if o["use_weighting"]:
        weights = (METHODS["wpo"].wpo_weights(chosen, padded(inputs["log_sum_sq_chosen"])[0], chosen_mask)
                   * METHODS["wpo"].wpo_weights(rejected, padded(inputs["log_sum_sq_rejected"])[0], rejected_mask))
    loss_types = [o["loss_type"]] if isinstance(o["loss_type"], str) else o["loss_type"]
    passed = ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau")
    terms, metrics = preference_losses(
        loss_types, chosen, chosen_mask, rejected, rejected_mask, padded(inputs["ref_chosen"])[0],
        padded(inputs["ref_rejected"])[0], pair_weights=weights, bco_shift=bco_shift, nll_normalization=nll_normalization,
        **{name: o[name] for name in passed if o[name] is not None})
    mean = {name: total / count for name, (total, count) in terms.items()}
    loss = sum(weight * mean[name] for name, weight in zip(loss_types, o["loss_weights"] or [1.0] * len(loss_types)))
    loss.backward()
    # sft alone has no gradient for the rejected answer: zeros in TRL's batch, None here
    rejected_grad = torch.zeros_like(rejected) if rejected.grad is None else rejected.grad
    return {"value": loss.item(),
            "terms": {name: value.item() for name, value in mean.items()},
            "grad": {"chosen": as_rows(chosen.grad, chosen_mask), "rejected": as_rows(rejected_grad, rejected_mask)},
            "metrics": {name: float(total / count) for name, (total, count) in metrics.items()}}


@in_dtype
def our_policy(case, **overrides):
    o, inputs = options(case) | overrides, INPUTS[case["inputs"]]
    logps, mask = leaf(inputs["logps"])
    old, ref, sampling = (padded(inputs.get(name, inputs["logps"]))[0] for name in ("old", "ref", "sampling"))
    entropies = leaf(inputs.get("entropies", inputs["logps"]))[0]
    A = torch.tensor(inputs["advantages"])
    passed = ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta",
              "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
              "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    total, count, metrics = 0.0, 0.0, {}
    for at in o["micro_batches"] or [list(range(len(mask)))]:
        weighing = {}
        if o["off_policy_mask_threshold"] is not None:
            weighing["keep"] = METHODS["off_policy_mask"].off_policy_mask(logps[at], sampling[at], A[at], mask[at],
                                                                          o["off_policy_mask_threshold"])
        if o["top_entropy_quantile"] < 1:
            top = METHODS["high_entropy"].top_entropy_mask(entropies[at], mask[at], o["top_entropy_quantile"])
            weighing["keep"] = top & weighing.get("keep", top)
        if o["importance_sampling_correction"]:
            weighing["correction"] = losses.sampler_correction(
                old[at], sampling[at], mask[at], o["importance_sampling_correction"], o["clip_max"], o["clip_min"])
        loss, metrics = losses.policy_loss(
            logps[at], logps[at].detach() if o["on_policy"] else old[at], A[at], mask[at], ref_logps=ref[at],
            **weighing, **{name: o[name] for name in passed if o[name] is not None})
        total = total + loss
        count += losses.policy_loss_count(o["loss_type"], mask[at], o["max_completion_length"])
    loss = total / count - o["entropy_coef"] * losses.masked_sum(entropies, mask).sum() / mask.sum()
    loss.backward()
    return {"value": loss.item(),
            "grad": {"logps": as_rows(logps.grad, mask), "entropies": as_rows(entropies.grad, mask)},
            "metrics": {name: float(total / count) for name, (total, count) in metrics.items()}}


@in_dtype
def our_rloo(case):
    o, inputs = options(case), INPUTS[case["inputs"]]
    logps, mask = leaf(inputs["logps"])
    total, _ = losses.policy_loss(logps, padded(inputs["old"])[0], torch.tensor(inputs["advantages"]), mask,
                                  loss_type="grpo", importance_sampling_level="sequence_sum", epsilon=o["epsilon"],
                                  epsilon_high=o["epsilon_high"])
    loss = total / losses.policy_loss_count("grpo", mask, 9)
    loss.backward()
    return {"value": loss.item(), "grad": {"logps": as_rows(logps.grad, mask)}}


@in_dtype
def our_advantages(case):
    o, inputs = options(case), INPUTS[case["inputs"]]
    scores = torch.tensor([[math.nan if x is None else x for x in row] for row in inputs["scores"]])
    penalty = 0.0
    if o["kl"]:
        old, mask = padded(INPUTS[o["kl"]]["old"])
        penalty = o["beta"] * losses.masked_sum(old - padded(INPUTS[o["kl"]]["ref"])[0], mask)
    A = losses.advantages(o["estimator"], scores, torch.tensor(inputs["weights"]), inputs["num_generations"],
                          scale_rewards=o["scale_rewards"], penalty=penalty)
    return {"value": A.tolist()}


@in_dtype
def our_function(case):
    o, inputs = dict(case["options"]), INPUTS[case["inputs"]]
    logps, mask = padded(inputs["logps"])
    old, sampling, entropies = (padded(inputs[name])[0] for name in ("old", "sampling", "entropies"))
    A, function = torch.tensor(inputs["advantages"]), o.pop("function")
    if function == "off_policy_mask":
        return METHODS["off_policy_mask"].off_policy_mask(logps, sampling, A, mask, o["threshold"]), torch.ones(len(mask), 1).bool()
    if function == "top_entropy_mask":
        return METHODS["high_entropy"].top_entropy_mask(entropies, mask, o["quantile"]), mask
    if function == "correction":
        return losses.sampler_correction(old, sampling, mask, **o), mask
    if function == "gamma_weights":  # the loss of a token of log-prob -1 and advantage +-1
        sign = torch.where(A >= 0, 1.0, -1.0)[:, None]
        loss = losses.vespo_term(None, sign, logps=-1.0, token_log_ratios=torch.where(mask, logps - old, 0.0),
                                 log_correction=0.0, **{"vespo_" + name: value for name, value in o.items()})
        return loss / sign, torch.ones(len(mask), 1).bool()
    raise AssertionError(function)


# --- (a) the stored goldens


@select("preference")
def test_preference_losses(case):
    """A loss of pairs whose formula, mask, length, reference or mean is another than TRL's."""
    assert_equals_golden(case, our_preference(case))


@select("policy")
def test_policy_losses(case):
    """A ratio, a clip, a KL, a mask, a weight or a mean of the policy losses that is another than TRL's."""
    assert_equals_golden(case, our_policy(case))


@select("rloo")
def test_rloo_loss(case):
    """RLOO's ratio is of the whole completion: a sum of log-ratios, not their mean, clipped as one."""
    assert_equals_golden(case, our_rloo(case))


@select("advantages")
def test_advantages(case):
    """A function or a completion that abstains must drop out of mean, std and baseline, not count as 0."""
    assert_equals_golden(case, our_advantages(case))


@select("functions")
def test_masks_and_weights(case):
    """A mask that keeps what TRL drops, or a weight clipped at the other bound, would hide in a loss's mean."""
    ours, mask = our_function(case)
    theirs = torch.tensor(case["value"], dtype=torch.float64)
    if case["options"].get("mode", "").startswith("sequence"):  # (N, 1) there
        theirs = theirs.expand(-1, ours.shape[1])
    theirs = torch.nn.functional.pad(theirs, (0, ours.shape[1] - theirs.shape[1]))
    torch.testing.assert_close(ours[mask].double(), theirs[mask], **TOLERANCE[case["dtype"]])


def test_options_act():
    """A golden whose option changes nothing tests nothing: of one loss on the same tensors no two are equal, but where
    the option does nothing by definition."""
    seen = {}
    for case in CASES:
        o = case["options"]
        without_effect = (
            o.get("f_divergence_type") == "reverse_kl" or o.get("f_alpha_divergence_coef") == 1.0 or o.get("on_policy")
            or "f_divergence_type" in o and o["loss_type"] not in make_trl_goldens.SCORE_LOSSES
            or "ld_alpha" in o and o["loss_type"] == "sft")
        if case["runner"] not in ("preference", "policy") or case["group"] in DIFFERING or without_effect:
            continue
        key = (case["inputs"], str(o["loss_type"]), o.get("importance_sampling_level", "token"), o.get("beta"))
        gradient = tuple(flat(case.get("grad", case["value"])))
        assert gradient not in seen.setdefault(key, {}), (case["id"], seen[key][gradient])
        seen[key][gradient] = case["id"]


# --- (b) TRL itself


def assert_same(made, stored, where, **tolerance):
    if isinstance(stored, dict):
        assert made.keys() == stored.keys(), where
        for key in stored:
            assert_same(made[key], stored[key], f"{where}.{key}", **tolerance)
    elif isinstance(stored, list):
        assert len(made) == len(stored), where
        for i, (a, b) in enumerate(zip(made, stored)):
            assert_same(a, b, f"{where}[{i}]", **tolerance)
    elif isinstance(stored, float):
        assert made == pytest.approx(stored, **tolerance), where
    else:
        assert made == stored, where


@pytest.mark.slow
def test_installed_trl_gives_the_stored_goldens():
    """A release of TRL that changes a formula must be noticed; the file must be what its script writes."""
    pytest.importorskip("trl")
    made = make_trl_goldens.make()
    assert_same(made["inputs"], INPUTS, "inputs", rel=0, abs=0)
    assert [c["id"] for c in made["cases"]] == [c["id"] for c in CASES]
    for ours, stored in zip(made["cases"], CASES):
        tolerance = dict(rel=1e-10, abs=1e-13) if stored["dtype"] == "float64" else dict(rel=1e-6, abs=1e-6)
        if stored["group"] == "equal_rewards":  # rounding noise over 1e-4: that of the machine
            tolerance = dict(rel=1e-6, abs=1e-3)
        assert_same(ours, stored, stored["id"], **tolerance)


# --- (c) where we differ from TRL, and where the two agree


def differ(a, b, by=1e-3):
    a, b = (torch.tensor(flat(x), dtype=torch.float64) for x in (a, b))
    return ((a - b).abs() > by * b.abs().clamp(min=1e-3)).any()


def test_bco_shift_is_ours():
    """TRL's bco_pair has no shift: equal at delta 0 only. A shift of the wrong sign, or of one answer only, would not
    give what TRL gives for log-ratios moved by delta / beta."""
    case, shifted = (find("differs", inputs, loss_type="bco_pair", beta=0.3)
                     for inputs in ("pairs_one", "pairs_shifted"))
    assert_equals_golden(case, our_preference(case, bco_shift=0.0))
    ours = our_preference(case, bco_shift=-0.9)
    assert differ(ours["value"], case["value"]) and differ(ours["grad"], case["grad"])
    assert_equals_golden(shifted, ours)


def test_nll_normalization():
    """TRL's sft is the token mean of the micro-batch. Ours per answer is another number, unless lengths are equal."""
    case = find("loss_type", "pairs_short", loss_type="sft", beta=0.1)
    assert_equals_golden(case, our_preference(case, nll_normalization="token"))
    assert differ(our_preference(case, nll_normalization="sequence")["value"], case["value"])
    case = find("loss_type", "pairs_equal", loss_type="sft", beta=0.1)
    assert_equals_golden(case, our_preference(case, nll_normalization="sequence"))


def test_sigmoid_label_smoothing():
    """TRL drops label_smoothing for sigmoid without a word; ours is cDPO, equal only at 0."""
    plain = find("differs", "pairs_short", loss_type="sigmoid", beta=0.3)
    smoothed = find("differs", "pairs_short", loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    assert (smoothed["value"], smoothed["grad"]) == (plain["value"], plain["grad"])
    assert_equals_golden(plain, our_preference(plain))
    assert differ(our_preference(smoothed)["value"], smoothed["value"])
    assert_equals_golden(smoothed, our_preference(smoothed, label_smoothing=0.0))


def test_wpo_leaves_sft_alone():
    """WPO weighs pairs. TRL weighs the NLL of the chosen answer as well; ours stays that of a run without WPO."""
    weighted, plain = (find("differs", "pairs_one", loss_type=["sigmoid", "sft"], beta=0.3, **more)
                       for more in ({"use_weighting": True}, {}))
    sft_weighted, sft = (find("differs", "pairs_one", loss_type="sft", beta=0.3, **more)
                         for more in ({"use_weighting": True}, {}))
    weight = sft_weighted["value"] / sft["value"]
    assert abs(weight - 1) > 0.1
    assert weighted["value"] == pytest.approx(weight * plain["value"], rel=1e-9)
    ours = our_preference(weighted)
    assert ours["terms"]["sft"] == pytest.approx(sft["value"], rel=1e-9)
    assert ours["terms"]["sigmoid"] == pytest.approx(weight * (plain["value"] - sft["value"]), rel=1e-9)
    assert differ(ours["value"], weighted["value"])
    assert_equals_golden(plain, our_preference(plain))
    assert_equals_golden(sft, our_preference(sft_weighted))


def test_accuracy_of_a_tie():
    """When a run starts every pair is a tie: 0 in TRL, which reads as a model that prefers all the rejected."""
    case = find("differs", "pairs_start", loss_type="sigmoid", beta=0.3)
    assert case["metrics"]["rewards/accuracies"] == 0
    ours = our_preference(case)
    assert ours["metrics"]["rewards/accuracies"] == 0.5
    assert_close([ours["value"], ours["grad"]], [case["value"], case["grad"]], **TOLERANCE["float64"])


@select("advantages", "equal_rewards")
def test_equal_rewards_train_nothing(case):
    """Seven rewards of 0.9: the rounding of their mean, over 1e-4, is an advantage in TRL and exactly 0 here."""
    ours = our_advantages(case)["value"]
    noise = max(map(abs, case["value"][:7]))
    assert noise > {"float32": 1e-8 if case["options"]["estimator"] == "rloo" else 1e-4, "float64": 0}[case["dtype"]]
    assert ours[:7] == [0.0] * 7
    # The other group has a spread; GDPO subtracts the batch's mean, noise included.
    assert_close(ours[7:], case["value"][7:], rtol=1e-5, atol=2 * noise + 1e-6)


@select("policy", "micro_batches")
def test_mean_over_micro_batches(case):
    """Sum / count spans the optimizer step. TRL's mean of micro-batch means is the same where these are of equal
    size, or where it, too, divides by the step's tokens; bnpo is a mean of means by definition, in both."""
    ours = our_policy(case)
    sizes = [len(rows) for rows in case["options"]["micro_batches"]]
    if len(set(sizes)) == 1 or case["options"]["loss_type"] in ("bnpo", "dapo", "cispo", "vespo"):
        assert_equals_golden(case, ours)
    else:
        assert differ(ours["value"], case["value"]) and differ(ours["grad"]["logps"], case["grad"]["logps"])
    if case["options"]["loss_type"] != "bnpo":
        assert_close(ours["value"], our_policy(case, micro_batches=None)["value"], rtol=1e-12, atol=0)


@select("policy", "clamp")
def test_log_ratio_clamp(case):
    """The log-ratio's bound of 20, against overflow, must not act below it; above, TRL's loss goes on growing."""
    ours = our_policy(case)
    if case["inputs"] == "ratio_within":
        assert_equals_golden(case, ours)
    else:
        assert differ(ours["value"], case["value"]) and differ(ours["grad"]["logps"], case["grad"]["logps"])


@pytest.mark.parametrize("loss", [dict(loss_type="sigmoid", beta=1e-30, f_divergence_type="forward_kl"),
                                  dict(loss_type="discopop", beta=1.0, discopop_tau=10.0)],
                         ids=["forward_kl", "discopop"])
def test_exponent_clamp(loss):
    """The bound of 80 on e^-r, which fp32 needs, must not act below it."""
    case = find("differs", "pairs_within", **loss)
    assert_equals_golden(case, our_preference(case))
    case = find("differs", "pairs_beyond", **loss)
    assert differ(our_preference(case)["value"], case["value"])


def test_rloo_of_an_empty_completion():
    """All tokens masked: TRL adds -A of it to the value, ours nothing. The gradients, which train, are the same."""
    case = find("rloo_empty", "holes")
    ours, inputs = our_rloo(case), INPUTS["holes"]
    assert_close(ours["grad"], case["grad"], **TOLERANCE["float64"])
    empty = [A for A, row in zip(inputs["advantages"], inputs["logps"]) if set(row) == {None}]
    assert len(empty) == 1
    assert ours["value"] == pytest.approx(case["value"] + empty[0] / len(inputs["logps"]), rel=1e-9)
