"""The methods of papers/, as numbers worked out by hand and as runs; and files of one's own, which work the same."""

import inspect
import json
import math
import os
import re
import shlex
import shutil
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, InProcess, after_log, preference_losses
from safetensors.torch import load_file
from test_losses import (
    B_,
    E_,
    ETA,
    F64,
    MARGIN,
    NL,
    NW,
    P_,
    PAIRS_BY_HAND,
    PL,
    PW,
    check_by_hand,
    exp,
    group_batch,
    grouped,
    log,
    pair_batch,
    pair_loss,
    policy,
    policy_batch,
    sigma,
    summed,
    through_m,
    through_means,
)
from test_runs import (
    MIX,
    MIX_FILES,
    SCRIPTS,
    assert_same,
    capture,
    flags,
    grpo,
    launch,  # noqa: F401, a fixture
    plain_logps,
    rows_of_step,
    task,  # noqa: F401, a fixture
    with_weights,
)

import data
import losses
import model
import papers
import rollout
import train_dpo
import train_grpo

# --- pair losses by hand, as in test_losses.py


def soft_label(m, p):
    return -p * log(sigma(m)) - (1 - p) * log(sigma(-m)), -p * sigma(-m) + (1 - p) * sigma(m)


def madpo_weight(h, tau=log(0.999 / 0.001)):
    """As the authors' code has it, c_max 2, c_min 1/2."""
    c = 0.5 + 1.5 / (1 + 2 * exp(abs(h) - tau))
    return sigma(c * h) / sigma(h) if h > -tau else 1.0


def posterior(m, eta):
    return eta * sigma(m) / (eta * sigma(m) + (1 - eta) * sigma(-m))


def tgdpo_by_hand(w, l):
    x = B_ * (1.2 * w + 0.3 - (0.7 * l - 0.2))
    return -log(sigma(x)), -1.2 * B_ * sigma(-x), 0.7 * B_ * sigma(-x)


def asft_by_hand(w, l):
    p_w, p_l = exp((w - 7) / NW), exp((l - 8) / NL)
    return -log(p_w) - log(1 - p_l), -1 / NW, p_l / (1 - p_l) / NL


def orpo_by_hand(w, l):
    p_w, p_l = exp((w - 7) / NW), exp((l - 8) / NL)
    x = log(p_w / (1 - p_w)) - log(p_l / (1 - p_l))
    return -log(sigma(x)), -sigma(-x) / (1 - p_w) / NW, sigma(-x) / (1 - p_l) / NL


def smoothed_by_hand(x):
    """Value and slope of -(1 - eps) log sigma(x) - eps log sigma(-x)."""
    return -(1 - E_) * log(sigma(x)) - E_ * log(sigma(-x)), -(1 - E_) * sigma(-x) + E_ * sigma(x)


def cpo_by_hand(w, l):
    value, slope_ = smoothed_by_hand(B_ * (w - 7 - (l - 8)))
    return value, B_ * slope_, -B_ * slope_


def alphapo_by_hand(w, l):
    a, b = exp(-0.25 * (w - 7) / NW), exp(-0.25 * (l - 8) / NL)
    value, slope_ = smoothed_by_hand(B_ * ((1 - a) - (1 - b)) / 0.25 - 1)
    return value, B_ * slope_ * a / NW, -B_ * slope_ * b / NL


BY_HAND = {
    "gpo": lambda w, l: ((w - 2.5 / B_) ** 2 + (l + 1.5 / B_) ** 2, 2 * (w - 2.5 / B_), 2 * (l + 1.5 / B_)),
    "orpo": orpo_by_hand, "cpo": cpo_by_hand, "alphapo": alphapo_by_hand,
    "ipo_sum": lambda w, l: ((w - l - 1 / (2 * B_)) ** 2, 2 * (w - l - 1 / (2 * B_)), -2 * (w - l - 1 / (2 * B_))),
    "sppo_soft": lambda w, l: ((w - (PW - 0.5) / B_) ** 2 + (l - (PL - 0.5) / B_) ** 2, 2 * w - 2 * (PW - 0.5) / B_,
                               2 * l - 2 * (PL - 0.5) / B_),
    "ipo_soft": through_means(lambda x: (x - (PW - PL) / B_) ** 2, lambda x: 2 * (x - (PW - PL) / B_)),
    "dno": through_m(lambda m: soft_label(m, P_)[0], lambda m: soft_label(m, P_)[1]),
    "modpo": through_m(lambda m: -log(sigma(m - MARGIN)), lambda m: -sigma(MARGIN - m)),
    "modpo_hinge": through_m(lambda m: max(0, 1 - m + MARGIN), lambda m: -1.0 if m - MARGIN < 1 else 0.0),
    "madpo": through_m(lambda m: -madpo_weight(MARGIN) * log(sigma(m)), lambda m: -madpo_weight(MARGIN) * sigma(-m)),
    "lcpo": through_m(lambda m: soft_label(m, posterior(m, ETA))[0], lambda m: soft_label(m, posterior(m, ETA))[1]),
    "tgdpo": tgdpo_by_hand, "asft": asft_by_hand}


@pytest.mark.parametrize("w, l", PAIRS_BY_HAND)
@pytest.mark.parametrize("name", BY_HAND)
def test_pair_losses_of_papers_by_hand(name, w, l):
    """P1: value and both derivatives of each pair loss of papers/, worked out on paper, to 1e-10."""
    check_by_hand(BY_HAND, name, w, l)


def test_every_pair_loss_of_papers_is_worked_out():
    """A loss added without its own derivation here fails."""
    assert {name for method in METHODS.values() for name in getattr(method, "PAIR_LOSSES", {})} == set(BY_HAND)


@pytest.mark.parametrize("kind, alpha, value, derivative", [
    ("reverse_kl", 0.5, lambda r: r, lambda r: 1.0),
    ("forward_kl", 0.5, lambda r: 1 - exp(-r), lambda r: exp(-r)),
    ("js_divergence", 0.5, lambda r: log(2) + log(sigma(r)), lambda r: sigma(-r)),
    ("alpha_divergence", 0.3, lambda r: (exp(-0.7 * r) - 1) / -0.7, lambda r: exp(-0.7 * r)),
    ("alpha_divergence", 0.0, lambda r: 1 - exp(-r), lambda r: exp(-r)),
    ("alpha_divergence", 1.0, lambda r: r, lambda r: 1.0)])
@pytest.mark.parametrize("r", [-2.0, 0.0, 1.3])
def test_f_divergences_by_hand(kind, alpha, value, derivative, r):
    """f-DPO: value and derivative; alpha 0 is the forward KL, alpha 1 the reverse KL. All are 0 with slope 1 or 1/2 at 0."""
    x = torch.tensor([r], **F64, requires_grad=True)
    score = METHODS["f_dpo"].f_divergence_score(x, kind, alpha)
    assert score.item() == pytest.approx(value(r), abs=1e-12)
    assert torch.autograd.grad(score, x)[0].item() == pytest.approx(derivative(r), abs=1e-12)


def test_f_divergence_reaches_the_losses_that_have_one():
    """sigmoid on forward-KL scores is -log sigma(beta (e^-l - e^-w)); nca_pair stays as it is; a typo raises."""
    batch = pair_batch()
    kwargs = dict(beta=0.1, f_divergence_type="forward_kl")
    terms, metrics = preference_losses(["sigmoid", "nca_pair"], *batch, **kwargs)
    w, l = [0.0, 1.0], [-1.0, -0.5]
    expected = sum(-log(sigma(0.1 * (exp(-b) - exp(-a)))) for a, b in zip(w, l))
    assert terms["sigmoid"][0].item() == pytest.approx(expected)
    plain, _ = preference_losses(["nca_pair"], *batch, beta=0.1)
    assert terms["nca_pair"][0] == plain["nca_pair"][0]
    assert metrics["rewards/margins"][0].item() == pytest.approx(0.1 * (sum(w) - sum(l)))
    with pytest.raises(ValueError, match="forward"):
        preference_losses(["sigmoid"], *batch, beta=0.1, f_divergence_type="forward")


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "discopop"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_outliers_stay_finite_in_every_f_divergence(name, kind):
    """A log-ratio of +-1000 gives a finite value and gradient: e^1000 is inf."""
    for w, l in ((1000.0, -1000.0), (-1000.0, 1000.0)):
        r = torch.tensor([w, l], requires_grad=True)
        loss = pair_loss(name, *(METHODS["f_dpo"].f_divergence_score(x, kind) for x in r.split(1))).sum()
        assert loss.isfinite() and torch.autograd.grad(loss, r)[0].isfinite().all()


def test_ld_dpo_weighs_the_tail_of_the_longer_answer():
    """LD-DPO: tokens beyond the shorter answer's length count ld_alpha, in policy and reference; 1 is plain DPO."""
    batch = pair_batch()  # lengths 2 and 1, 3 and 2
    terms, _ = preference_losses(["sigmoid"], *batch, beta=0.1, ld_alpha=0.5)
    w = [0.5 + 0.5 * -0.5, (0.5 + 0.25) + 0.5 * 0.25]  # per-token log-ratios (0.5, -0.5) and (0.5, 0.25, 0.25)
    assert terms["sigmoid"][0].item() == pytest.approx(sum(-log(sigma(0.1 * (a - b))) for a, b in zip(w, [-1.0, -0.5])))
    grad = torch.autograd.grad(terms["sigmoid"][0], batch[0])[0]
    torch.testing.assert_close(grad[0, 1], 0.5 * grad[0, 0])
    for loss in ("sigmoid", "ipo", "simpo"):
        plain, same = (preference_losses([loss], *batch, beta=0.1, ld_alpha=a)[0][loss][0] for a in (1.0, 1.0 - 1e-13))
        assert plain.item() == pytest.approx(same.item())


def test_wpo_weights_by_hand():
    """WPO: exp of the mean of log p - log sum p^2 over the answer's tokens; no gradient; it multiplies the pair's loss."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    logps = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -0.1, -0.3]], **F64, requires_grad=True)
    squares = torch.tensor([[-0.5, -1.0, math.nan], [-0.2, -0.2, -0.2]], **F64)
    weights = METHODS["wpo"].wpo_weights(logps, squares, mask)
    torch.testing.assert_close(weights, torch.tensor([exp(-0.75), exp((-0.3 + 0.1 - 0.1) / 3)], **F64))
    assert not weights.requires_grad
    batch = pair_batch()
    for name in ("sigmoid", "bco_pair"):
        weighted, _ = preference_losses([name], *batch, beta=0.1, pair_weights=torch.tensor([2.0, 0.0]))
        first, _ = preference_losses([name], *(x[:1] for x in batch), beta=0.1)
        assert weighted[name][0].item() == pytest.approx(2 * first[name][0].item()) and weighted[name][1] == 2


def test_limits_of_the_column_losses():
    """Where a column says nothing, the loss is the plain one: SPPO with P = 1, 0, labels of 1 - eps, a margin of 0; and
    ASFT's two terms are the log-sigmas of log-odds that the paper writes."""
    r_w, r_l = torch.tensor([1.5, -2.0], **F64), torch.tensor([-0.5, 3.0], **F64)

    def same(name, other, **columns):
        torch.testing.assert_close(pair_loss(name, r_w, r_l, **columns), pair_loss(other, r_w, r_l))

    same("sppo_soft", "sppo_hard", chosen_probs_win=1, chosen_probs_lose=0)
    same("ipo_soft", "ipo", chosen_probs_win=0.9, chosen_probs_lose=0.4)
    same("dno", "sigmoid", chosen_probs=1 - E_)
    same("modpo_hinge", "hinge", margin=0)
    torch.testing.assert_close(pair_loss("modpo", r_w, r_l, margin=0), pair_loss("sigmoid", r_w, r_l, label_smoothing=0.0))
    means = torch.stack([(r_w - 7) / NW, (r_l - 8) / NL])
    log_odds = means - torch.log(1 - means.exp())
    expected = -torch.log(torch.sigmoid(log_odds[0])) - torch.log(torch.sigmoid(-log_odds[1]))
    torch.testing.assert_close(pair_loss("asft", r_w, r_l), expected)
    simpo = pair_loss("simpo", r_w, r_l, simpo_gamma=1.0)  # AlphaPO's limit; and SPPO's scores are P - 1/2
    for alpha in (0.0, 1e-9):
        torch.testing.assert_close(pair_loss("alphapo", r_w, r_l, alpha=alpha), simpo, rtol=1e-5, atol=0)
    same("gpo", "sppo_hard", chosen_scores=0.5, rejected_scores=-0.5)


def test_madpo_weights_by_hand():
    """MADPO: c = 1, so weight 1, at |h| = tau; above 1 for hard pairs that the reward model gets right, below for easy
    ones and for those that it gets a little wrong, 1 where it is sure that the label is wrong; finite far out."""
    tau = log(999)
    margins = torch.tensor([-30.0, -tau - 1e-9, -tau + 1e-6, -3.0, -0.5, 0.0, 0.5, 3.0, tau, tau + 2, 30.0], **F64)
    weights = METHODS["madpo"].madpo_weights(margins)
    torch.testing.assert_close(weights, torch.tensor([madpo_weight(h) for h in margins.tolist()], **F64))
    assert weights[:2].tolist() == [1, 1] and weights[5] == 1 and weights[8].item() == pytest.approx(1)
    assert (weights[3:5] < 1).all() and (weights[6:8] > 1).all() and weights[9] < 1
    assert METHODS["madpo"].madpo_weights(torch.tensor([-1e6, 1e6])).tolist() == [1, 1]


def test_lcpo_posterior_and_eta():
    """LCPO: Bayes' rule on the label, no gradient, finite at the ends; eta moves a tenth of the way to the mean of q, and
    stays where it is while the policy is the reference (q = eta)."""
    m = torch.tensor([-3.0, 0.0, 0.4], **F64, requires_grad=True)
    q = METHODS["lcpo"].lcpo_posterior(m, 0.9)
    torch.testing.assert_close(q, torch.tensor([posterior(x, 0.9) for x in m.tolist()], **F64))
    assert not q.requires_grad and q[1].item() == pytest.approx(0.9)
    for eta in (0.0, 1.0):
        assert METHODS["lcpo"].lcpo_posterior(torch.tensor([-1e4, 0.0, 1e4]), eta).isfinite().all()
    assert METHODS["lcpo"].next_lcpo_eta(0.9, 0.4) == pytest.approx(0.85)
    batch = pair_batch()
    terms, metrics = preference_losses(["lcpo"], *batch, beta=0.1, eta=0.8)
    ms = [0.1 * (a - b) for a, b in zip([0.0, 1.0], [-1.0, -0.5])]
    assert terms["lcpo"][0].item() == pytest.approx(sum(soft_label(x, posterior(x, 0.8))[0] for x in ms))
    assert metrics["lcpo_posterior"][0].item() == pytest.approx(sum(posterior(x, 0.8) for x in ms))


def test_tgdpo_weighs_tokens_by_the_guide():
    """TGDPO: 1 + alpha rhat on a chosen token, 1 - alpha rhat on a rejected one, rhat = beta log(guide / reference);
    nan in the padding stays there; a guide that is the reference gives DPO; metrics are those of plain log-ratios."""
    batch = pair_batch()
    ref_w, ref_l = batch[4:]
    guides = [ref + torch.tensor([1.0, -2.0, 3.0], **F64)[:ref.shape[1]] for ref in (ref_w, ref_l)]
    beta, alpha = 0.1, 0.5
    terms, metrics = preference_losses(["tgdpo"], *batch, *guides, beta=beta)
    u = [[(0.5, -0.5), (0.5, 0.25, 0.25)], [(-1.0,), (0.0, -0.5)]]  # per-token log-ratios of policy to reference
    rhat = [beta * x for x in (1.0, -2.0, 3.0)]
    w, l = ([sum((1 + sign * alpha * h) * x for x, h in zip(pair, rhat)) for pair in side] for side, sign in zip(u, (1, -1)))
    assert terms["tgdpo"][0].item() == pytest.approx(sum(-log(sigma(beta * (a - b))) for a, b in zip(w, l)))
    grads = torch.autograd.grad(terms["tgdpo"][0], (batch[0], batch[2]))
    for i, (a, b) in enumerate(zip(w, l)):
        slope_ = beta * sigma(-beta * (a - b))
        for t in range(len(u[0][i])):
            assert grads[0][i, t].item() == pytest.approx(-slope_ * (1 + alpha * rhat[t]))
        for t in range(len(u[1][i])):
            assert grads[1][i, t].item() == pytest.approx(slope_ * (1 - alpha * rhat[t]))
    assert grads[0][0, 2] == 0 and grads[1][0, 1] == 0
    plain, expected = preference_losses(["sigmoid"], *batch, beta=beta)
    same, _ = preference_losses(["tgdpo"], *batch, ref_w, ref_l, beta=beta)
    assert same["tgdpo"][0].item() == pytest.approx(plain["sigmoid"][0].item())
    assert metrics["rewards/margins"][0] == expected["rewards/margins"][0]


def test_ngrpo_by_hand():
    """NGRPO: mean and std of the group and a virtual completion of reward 1.5 (the weights' sum). All wrong: all negative,
    where GRPO has 0; all right: exactly 0; nan stays out, and a group of nan is 0."""
    nan = math.nan
    scores = torch.tensor([[1.0, 0, 0, 0, 1, 1, 1, nan], [1.0, 0, 0, 0, 1, 1, 0, nan]], **F64)
    A = losses.advantages("ngrpo", scores, torch.tensor([1.0, 0.5], **F64), 2)
    for i, group in ((0, [1.5, 0.0, 1.5]), (2, [0.0, 0.0, 1.5])):
        mean = sum(group) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 2)
        for k in (0, 1):
            assert A[i + k].item() == pytest.approx((group[k] - mean) / (std + 1e-4))
    assert (A[2:4] < 0).all() and (A[4:6] == 0).all()
    assert A[6].item() == pytest.approx(-0.25 / (math.sqrt(0.125) + 1e-4)) and A[7] == 0
    assert (losses.advantages("ngrpo", torch.full((1, 4), nan, **F64), torch.ones(1, **F64), 2) == 0).all()


def test_dgpo_by_hand():
    """DGPO: the mean absolute deviation divides, and a softmax of -p/2 over the groups with spread weighs, times their
    number: harder prompts more, groups without spread not at all; one group alone has weight 1. p is that of the first
    function; a group that spreads by format alone, without a right answer, got the highest weight, and gets the lowest."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0], **F64)
    A = METHODS["dgpo"].dgpo_advantages(rewards, 4, rewards)
    hard, easy = exp(-0.25 / 2), exp(-0.75 / 2)
    weights = [2 * hard / (hard + easy), 2 * easy / (hard + easy)]
    mad = 2 * 0.75 / 4
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]], **F64) / mad
    for g in (0, 1):
        torch.testing.assert_close(A[4 * g:4 * g + 4], expected[g] * weights[g], rtol=1e-3, atol=0)
    assert (A[8:] == 0).all() and weights[0] > 1 > weights[1]
    torch.testing.assert_close(METHODS["dgpo"].dgpo_advantages(rewards[:4], 4, rewards[:4]), expected[0], rtol=1e-3, atol=0)
    halved = METHODS["dgpo"].dgpo_advantages(rewards / 2, 4, rewards)
    torch.testing.assert_close(halved, A, rtol=1e-3, atol=0)
    scores = torch.stack([rewards, torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], **F64)])  # the third by format
    A = losses.advantages("dgpo", scores, torch.tensor([1.0, 0.1], **F64), 4)
    shares = torch.tensor([0.25, 0.75, 1.0], **F64).mul(-0.5).softmax(0) * 3
    torch.testing.assert_close(A[[0, 4, 8]], torch.tensor([2.0, 2 / 3, 2.0], **F64) * shares, rtol=2e-3, atol=0)


@pytest.mark.parametrize("A", [1.5, -1.5])
def test_gmpo_by_hand(A):
    """GMPO: exp of the mean of the log-ratios, each clipped to 0.4 before the mean and on PPO's side only; a clipped token
    counts in the mean and has no gradient. Clipping the mean instead, or both sides, would show."""
    log_ratios = [0.5, -0.5, 0.1]
    logps = torch.tensor([[*log_ratios, math.nan]], **F64, requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    loss, metrics = policy(logps, torch.zeros(1, 4, **F64), torch.tensor([A], **F64), mask, loss_type="gmpo", epsilon=0.4,
                           epsilon_high=0.4)
    kept = [min(x, 0.4) if A > 0 else max(x, -0.4) for x in log_ratios]
    value = -A * exp(sum(kept) / 3)
    assert loss.item() == pytest.approx(value)
    (grad,) = torch.autograd.grad(loss, logps)
    expected = [value / 3 * (k == x) for k, x in zip(kept, log_ratios)]
    assert grad[0].tolist() == pytest.approx([*expected, 0.0])
    assert metrics["clip_ratio/high_mean"][0] == (A > 0) and metrics["clip_ratio/low_mean"][0] == (A < 0)


def test_off_policy_mask_by_hand():
    """DeepSeek-V3.2: dropped are completions with A < 0 whose mean log-prob fell by more than the threshold."""
    mask = torch.tensor([[1, 1, 0]] * 4).bool()
    logps = torch.tensor([[-2.0, -2.0, math.nan]] * 4, **F64)
    sampled = logps + torch.tensor([[0.7], [0.7], [0.3], [-0.7]])
    keep = METHODS["off_policy_mask"].off_policy_mask(logps, sampled, torch.tensor([-1.0, 1.0, -1.0, -1.0]), mask, 0.5)
    assert keep.flatten().tolist() == [False, True, True, True] and keep.shape == (4, 1)


def test_top_entropy_mask_by_hand():
    """The quantile of the micro-batch's tokens with the highest entropy; padding never counts; 1 keeps all."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    entropies = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 99.0]])
    assert METHODS["high_entropy"].top_entropy_mask(entropies, mask, 0.4).tolist() == [[False, True, False], [True, False, False]]
    assert torch.equal(METHODS["high_entropy"].top_entropy_mask(entropies, mask, 1.0), mask)
    assert not METHODS["high_entropy"].top_entropy_mask(entropies, torch.zeros(2, 3).bool(), 0.5).any()


def test_gtpo_by_hand():
    """GTPO: -c (A - 0.1 H), H the mean entropy of the completion's own tokens and a constant; no clip, also far off policy;
    a completion of H above log 2 is dropped (the authors' code also drops all of a policy that started above it, which
    never learns), and one of A = 0 is still pushed down by its entropy."""
    logps, old, A, mask = policy_batch()
    old, A[1] = old - 0.5, 0.0
    entropies = torch.tensor([[0.5, 0.1, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3], [0.9, 0.9, 0.9, 0.9]], **F64)
    entropies = torch.where(mask, entropies, math.nan).requires_grad_()
    H = [entropies[i][mask[i]].mean().item() for i in range(3)]
    assert max(H[:2]) < math.log(2) < H[2]
    loss, metrics = policy(logps, old, A, mask, loss_type="gtpo", entropies=entropies, initial_entropy=0.5)
    expected = sum(-(logps[i] - old[i])[mask[i]].exp().mean() * (A[i] - 0.1 * H[i]) for i in range(2))
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)
    assert (grad[2] == 0).all() and (grad[1][mask[1]] > 0).all() and "clip_ratio/region_mean" not in metrics
    assert torch.autograd.grad(loss, entropies, allow_unused=True) == (None,)
    loss, _ = policy(logps, old, A, mask, loss_type="gtpo", entropies=entropies, initial_entropy=0.7)
    torch.testing.assert_close(loss, expected - (logps[2] - old[2])[mask[2]].exp().mean() * (A[2] - 0.1 * H[2]))


def test_gtpo_weights_by_hand():
    """GTPO's lambda: tokens that a better and a worse completion share at the same place from the start (here 7 8, and in
    rows 0 and 1 also 5) or from the end (9 1), without a break; not the 9 behind a break, not what completions of one sign
    share, or with one of A = 0 (4), not padding (whose id is that of the last token), not another group."""
    rows = [([7, 8, 5, 4, 9, 1], 1.0), ([7, 8, 5, 6, 9, 2, 3, 9, 1], -2.0), ([7, 3, 1], -1.0), ([7, 8, 5, 4], 0.0),
            ([7, 8, 9, 1], 1.0), ([7, 8, 9, 1], 1.0), ([2, 1], 0.5), ([2], -1.0)]
    mask = torch.arange(9) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
    ids = torch.full((8, 9), 1).masked_scatter(mask, torch.tensor(sum((ids for ids, _ in rows), [])))
    weights = METHODS["gtpo"].gtpo_weights(ids, torch.tensor([A for _, A in rows]), mask, 4)
    expected = [[2, 2, 2, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0], [1, 1, 1, 1],
                [1, 1, 1, 1], [1, 1, 1, 1], [2, 1], [0]]
    assert [row[:len(e)].tolist() for row, e in zip(weights, expected)] == expected
    assert (weights[~mask] == 1).all()


def test_copg_is_rloo_on_policy_and_a_squared_difference_in_pairs():
    """CoPG: sum_{i<j} (R_i - R_j)^2 / (2 beta k (k - 1)), R = r - beta u; its gradient is that of RLOO with the KL in the
    reward, at any log-probs (the policy term at ratio 1). An abstention is left out of both."""
    logps, old, ref, mask, r = group_batch()
    beta = 0.3
    loss, count, _ = grouped("copg", logps, old, ref, mask, r, beta)
    R = (r - beta * summed(logps - ref, mask)).view(2, 3)
    pairs = sum((R[g, i] - R[g, j]) ** 2 for g in (0, 1) for i, j in ((0, 1), (0, 2), (1, 2))) / (2 * beta * 6)
    torch.testing.assert_close(loss, pairs)
    (grad,) = torch.autograd.grad(loss / count, logps)
    A = losses.rloo_advantages(R.detach().flatten(), 3)
    rloo, _ = policy(logps, logps.detach(), A, mask, "sequence_sum")
    (theirs,) = torch.autograd.grad(rloo / 6, logps)
    torch.testing.assert_close(grad, theirs)
    r[[2, 3, 4]] = math.nan
    loss, count, _ = grouped("copg", logps, old, ref, mask, r, beta)
    torch.testing.assert_close(loss, (R[0, 0] - R[0, 1]) ** 2 / (4 * beta))
    assert count == 1


def test_trpa_by_hand():
    """TRPA: every pair of different reward, log-ratios averaged over tokens, 2.5 beta where the better one has full marks;
    the mean is over pairs, so groups of many levels weigh more, as in the authors' code."""
    logps, old, ref, mask, r = group_batch()
    u = summed(logps - ref, mask) / mask.sum(-1)
    expected = sum(-torch.log(torch.sigmoid((2.5 if i == 0 else 1.0) * 0.3 * (u[i] - u[j])))
                   for i, j in ((0, 1), (0, 2), (2, 1), (3, 4), (5, 4)))
    loss, count, metrics = grouped("trpa", logps, old, ref, mask, r)
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)
    assert count == 5 and metrics["frac_groups_skipped"] == (0, 2)
    assert grouped("trpa", logps, old, ref, mask, torch.zeros(6, **F64))[:2] == (0, 0)


@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_disco_by_hand(drift):
    """DisCO: mean log-prob per token of the right ones against tau log-mean-exp of the wrong ones; a step that drifted by
    more than delta pays beta (KL - delta) KL, whose gradient has the first factor as a constant. Groups that tie count,
    and pay, too: without them the gradient grew by the share of such groups, and a step of ties alone drifted freely."""
    logps, _, _, mask, r = group_batch()
    old, r[2] = logps.detach() + drift, -0.8
    s = summed(logps, mask) / mask.sum(-1)
    right, wrong = [(0,), (3, 5)], [(1, 2), (4,)]
    expected = sum(10 * torch.log(sum(torch.exp(s[i] / 10) for i in w) / len(w)) - sum(s[i] for i in p) / len(p)
                   for p, w in zip(right, wrong))
    kl = summed(old - logps, mask).sum() / mask.sum()
    expected = expected + 2 * max(0.0, 1e3 * (drift - 1e-4)) * kl
    loss, count, _ = grouped("disco", logps, old, None, mask, r, beta=0.0)
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)
    assert count == 2
    tied = torch.tensor([0.0, 0, 0, *r[3:]], **F64)
    for rewards, value in (torch.zeros(6, **F64), 0.0), (tied, 10 * torch.log(torch.exp(s[4] / 10)) - (s[3] + s[5]) / 2):
        loss, count, _ = grouped("disco", logps, old, None, mask, rewards, beta=0.0)
        torch.testing.assert_close(loss, value + 2 * max(0.0, 1e3 * (drift - 1e-4)) * kl)
        assert count == 2 and (torch.autograd.grad(loss, logps)[0][:3].nan_to_num() != 0).any() == (drift > 0)


def test_disco_leaves_out_who_stands_at_the_mean():
    """A completion of exactly the group's mean reward is neither right nor wrong: in fp32 its distance is a rounding of up
    to 1.2e-7, which a bound of 1e-7 took for a side."""
    for last in (0.0, 0.1, 0.2, 0.3, 0.4):
        r = torch.tensor([[0.5, 0.6, 0.6, 0.7]]) - 2 - last
        s = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
        METHODS["disco"].disco_loss(r, None, s, torch.ones(1, 4), drift=0.0 * s.sum()).sum().backward()
        assert (s.grad[0, [0, 3]] != 0).all() and (s.grad[0, 1:3] == 0).all(), last


def test_reg_grpo_by_hand():
    """Reg-GRPO: the mean square of GRPO's advantage less the log-ratio to the sampling policy, normalised like a reward in
    its group, and beta times the k3 of a completion's tokens; a completion without reward and a group without spread are
    left out; at ratio 1 the gradient is finite, and the policy gradient's (a plain std of 0 gives nan)."""
    logps, old, ref, mask, r = group_batch()
    r[1] = math.nan
    rho, expected, d = summed(logps - old, mask), 0, torch.where(mask, ref - logps, 0.0)
    kl = (d.exp() - 1 - d).sum(-1) / mask.sum(-1)
    for group in (0, 2), (3, 4, 5):
        x, R = torch.stack([rho[i] for i in group]), r[list(group)]
        A, Ahat = ((v - v.mean()) / (v.std() + e) for v, e in ((R, 1e-4), (x, 0.0)))
        expected = expected + ((A - Ahat) ** 2).mean() + 0.3 * kl[list(group)].mean()
    loss, count, metrics = grouped("reg_grpo", logps, old, ref, mask, r, beta=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-6)
    assert count == 2 and metrics["frac_groups_skipped"] == (0, 2) and (grad[1] == 0).all()
    (grad,) = torch.autograd.grad(grouped("reg_grpo", logps, logps.detach(), logps.detach(), mask, r)[0], logps)
    A = losses.group_advantages(r, 3) / torch.tensor([2, 2, 2, 3, 3, 3])
    torch.testing.assert_close(grad, torch.where(mask, -2e4 * A[:, None], 0.0))
    loss, count, _ = grouped("reg_grpo", logps, old, ref, mask, torch.full((6,), -1.0, **F64))
    assert (loss, count) == (0, 0) and (torch.autograd.grad(loss, logps)[0] == 0).all()

def test_maxrl_by_hand():
    """MaxRL: (r - mean) / mean of the group; a group whose mean is not above 0, and an abstention, get 0 (x / 0 is inf)."""
    r = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, math.nan, -1, 0, 0, 1, -1, 0, 0, 0], **F64)
    A = losses.advantages("maxrl", r[None], torch.ones(1, **F64), 4)
    expected = torch.tensor([3.0, -1, -1, -1, *[0.0] * 12], **F64)
    torch.testing.assert_close(A, expected)
    A = METHODS["maxrl"].maxrl_advantages(torch.tensor([1.0, 0.5, 0, math.nan], **F64), 4)
    torch.testing.assert_close(A, torch.tensor([1.0, 0, -1, 0], **F64))


def test_passk_by_hand():
    """Pass@k: the best completion alone, by its lead over the second in stds of the group; two that are best get nothing,
    nor does a group without a second reward."""
    nan = math.nan
    r = torch.tensor([0.0, 1.0, 0.25, 1.0, 1.0, 0.0, nan, 0.5, 0.1, nan, 0.7, nan], **F64)
    A = losses.advantages("passk", r[None], torch.ones(1, **F64), 3)
    std = torch.tensor([0.0, 1.0, 0.25], **F64).std()
    lead = 0.4 / (torch.tensor([0.5, 0.1], **F64).std() + 1e-6)
    expected = torch.tensor([0, 0.75 / (std + 1e-6), 0, 0, 0, 0, 0, lead, 0, 0, 0, 0], **F64)
    torch.testing.assert_close(A, expected)


def test_reinforce_plus_plus_baseline_by_hand():
    """REINFORCE++-baseline: the std is that of the centred rewards, not of the rewards: prompts of other difficulty would
    shrink all advantages. An abstention is out of it."""
    r = torch.tensor([10.0, 11, 0, 4, 3, math.nan], **F64)
    A = losses.advantages("reinforce_plus_plus_baseline", r[None], torch.ones(1, **F64), 2)
    z = torch.tensor([-0.5, 0.5, -2, 2, 0, 0], **F64)
    torch.testing.assert_close(A, z / (z[:5].std() + 1e-4))


def test_gvpo_by_hand():
    """GVPO: half the variance of beta rho - r in the group; at a rollout's first update beta times the policy gradient of
    centred rewards; a completion without a reward is out of it."""
    logps, old, _, mask, r = group_batch()
    r[1] = math.nan
    rho, expected = summed(logps - old, mask), 0
    for group in (0, 2), (3, 4, 5):
        expected = expected + torch.stack([0.1 * rho[i] - r[i] for i in group]).var() / 2
    loss, count, _ = grouped("gvpo", logps, old, None, mask, r, beta=0.0)
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)
    assert count == 2 and (grad[1] == 0).all()
    (grad,) = torch.autograd.grad(grouped("gvpo", logps, logps.detach(), None, mask, r, beta=0.0)[0], logps)
    A = losses.group_advantages(r, 3, scale_rewards="none") / torch.tensor([1, 1, 1, 2, 2, 2])
    torch.testing.assert_close(grad, torch.where(mask, -0.1 * A[:, None], 0.0))


@pytest.mark.parametrize("A", [1.5, -1.5])
def test_dppo_by_hand(A):
    """DPPO: the bound is on p - p_old: a ratio of 9 of a rare token stays, a ratio of 1.5 of a likely one goes, in A's
    direction only; what is left out keeps the drift term's gradient."""
    p, old = [0.9, 0.3, 0.009, 0.5], [0.6, 0.6, 0.001, 0.45]
    logps = torch.tensor([p], **F64).log().requires_grad_()
    mask = torch.ones(1, 4).bool()
    loss, _ = policy(logps, torch.tensor([old], **F64).log(), torch.tensor([A], **F64), mask, loss_type="dppo")
    kept = [A < 0, A > 0, True, True]
    assert loss.item() == pytest.approx(sum(-A * a / b * k + 1e-3 * log(a / b) ** 2 for a, b, k in zip(p, old, kept)))
    (grad,) = torch.autograd.grad(loss, logps)
    assert grad[0].tolist() == pytest.approx([-A * a / b * k + 2e-3 * log(a / b) for a, b, k in zip(p, old, kept)])


def test_kl_cov_by_hand():
    """KL-Cov: |log c| is added on the tokens of the highest covariance of advantage and log-prob alone, at least one; padding
    (nan) is neither in the means nor chosen."""
    logps, old, A, mask = policy_batch()
    p = logps.detach()[mask]
    a = A[:, None].expand_as(mask)[mask]
    top = ((a - a.mean()) * (p - p.mean())).argmax()
    d = (logps - old)[mask]
    expected = (-a * d.exp()).sum() + d[top].abs()
    loss, _ = policy(logps, old, A, mask, loss_type="kl_cov")
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)


def test_clip_cov_by_hand():
    """Clip-Cov: at least one token of a covariance between 1 and 5 loses its gradient, none that the clip has stopped, none
    of another covariance, no padding; the same seed and tokens choose the same."""
    logps = torch.tensor([[-0.1, -0.1, -6.0, math.nan], [-5.0, -0.2, -4.0, -0.3]], **F64)  # means: A 0, log-prob -2.24
    A, mask = torch.tensor([[4.0], [-3.0]], **F64).div(3), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    p, a = logps[mask], A.expand_as(mask)[mask]
    cov = torch.zeros(2, 4, **F64).masked_scatter(mask, (a - a.mean()) * (p - p.mean()))
    found = (cov > 1) & (cov < 5)
    assert found.sum() > 2
    old = logps.clone()
    old[0, 0] -= 1  # its ratio of e at A > 0 is clipped

    def chosen(seed, share=1.0):
        return ~METHODS["clip_cov"].clip_cov_mask(logps, old, A, mask, np.random.default_rng(seed), epsilon=0.2,
                                                  epsilon_high=0.2, share=share)

    assert found[0, 0] and not chosen(0)[0, 0]
    found[0, 0] = False
    assert torch.equal(chosen(0), found)
    one = [chosen(seed, 2e-4) for seed in (0, 0, 1, 2, 3)]
    assert all(x.sum() == 1 and (x & ~found).sum() == 0 for x in one) and torch.equal(one[0], one[1])
    assert any(not torch.equal(one[0], x) for x in one)


# --- runs


def test_columns_reach_the_losses(monkeypatch, tmp_path, task):
    """Three steps of a mix of every kind of column loss, weighted by a column: the third step's gradient is that of the
    formulas with each row's own numbers, LCPO's share moved by the mean of q of the first two steps; then TGDPO with
    that run's model as guide. A swapped, shifted or unread column would show here."""
    monkeypatch.chdir(tmp_path)
    steps, beta = capture(monkeypatch), 0.3
    pairs = [*map(str, ("--model_name_or_path", "tiny", "--dataset", task / "columns.jsonl", "--image_root", task, "--warmup_steps", 0, "--beta", beta,
                        "--learning_rate", 1e-4, "--max_steps", 3, "--per_device_train_batch_size", 2,
                        "--gradient_accumulation_steps", 2, "--max_grad_norm", 1e9, "--weight_column", "trust"))]
    train_dpo.main([*pairs, "--algo", "mpo", *MIX_FILES, "weighted", "--loss_type", *MIX,
                    "--loss_weights", "1", "0.7", "0.01", "0.4", "2", "0.1", "--output_dir", "out"])
    train_dpo.main([*pairs, "--algo", "tgdpo", "weighted", "--guide_model", "out/final", "--output_dir", "guided"])
    guide, _ = model.load_policy("out/final")
    policy, processor = model.load_policy("out/tiny_vlm")
    rows = data.read_rows(str(task / "columns.jsonl"), str(task), ())
    groups = [data.encode_group(policy, processor, rows[i], ("chosen", "rejected")) for i in data.Plan([12], 12, 0)]
    batches = [groups[i:i + 4] for i in range(0, 12, 4)]

    def scored(weights, batch):
        with_weights(policy, weights)
        return [[plain_logps(policy, prompt, ids) for ids in both] for prompt, both in batch]

    def log_sigma(x):
        return torch.log(torch.sigmoid(x))

    with torch.no_grad():
        ref = [scored(steps[0][0], batch) for batch in batches]
        eta = 0.9
        for i in (0, 1):
            now = scored(steps[i][0], batches[i])
            ms = [beta * float(w.sum() - rw.sum() - l.sum() + rl.sum()) for (w, l), (rw, rl) in zip(now, ref[i])]
            ps = [1 / (1 + math.exp(-m)) for m in ms]
            eta = 0.9 * eta + 0.1 * sum(eta * p / (eta * p + (1 - eta) * (1 - p)) for p in ps) / 4
    total = 0.0
    for (prompt, _), (w, l), (rw, rl) in zip(batches[2], scored(steps[2][0], batches[2]), ref[2]):
        row, r_w, r_l = prompt.row, w.sum() - rw.sum(), l.sum() - rl.sum()
        m, h = beta * (r_w - r_l), row["margin"]
        c = 0.5 + 1.5 / (1 + 2 * math.exp(abs(h)) / 999)
        madpo = (1 + math.exp(-h)) / (1 + math.exp(-c * h))
        p = torch.sigmoid(m).item()
        q = eta * p / (eta * p + (1 - eta) * (1 - p))
        sppo = (r_w - (row["chosen_probs_win"] - 0.5) / beta) ** 2 + (r_l - (row["chosen_probs_lose"] - 0.5) / beta) ** 2
        labels = row["chosen_probs"]
        pair = (-log_sigma(m - h) + 0.7 * (-labels * log_sigma(m) - (1 - labels) * log_sigma(-m)) + 0.01 * sppo
                - 0.4 * madpo * log_sigma(m) + 2 * (-q * log_sigma(m) - (1 - q) * log_sigma(-m)))
        total = total + (row["trust"] * pair - 0.1 * w.mean()) / 4
    total.backward()
    assert_same(steps[2][1], [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()], 1e-3)
    logged = [json.loads(line) for line in open("out/metrics.jsonl")]
    assert logged[3]["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert logged[3]["lcpo_eta"] == pytest.approx(eta, rel=1e-4) and abs(eta - 0.9) > 1e-3

    total = 0.0  # TGDPO's third step
    for (prompt, both), (w, l), (rw, rl) in zip(batches[2], scored(steps[5][0], batches[2]), ref[2]):
        with torch.no_grad():
            gw, gl = (plain_logps(guide, prompt, ids) for ids in both)
        w, l = ((1 + 0.5 * beta * (gw - rw)) * (w - rw)).sum(), ((1 - 0.5 * beta * (gl - rl)) * (l - rl)).sum()
        total = total - prompt.row["trust"] * log_sigma(beta * (w - l)) / 4
    total.backward()
    assert_same(steps[5][1], [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()], 1e-3)


def test_lcpo_share_is_in_the_checkpoint(launch, tmp_path, capsys):
    """A run that goes on from a checkpoint has the share of right labels that it was left with."""
    extra = ["--algo", "lcpo", "--beta", 1, "--max_steps", 4, "--save_steps", 2, "--per_device_train_batch_size", 4]
    whole, _ = launch("train_dpo", *extra)
    shutil.rmtree(tmp_path / "run0" / "checkpoints" / "step_4")
    (tmp_path / "run0" / "status.json").unlink()
    rest, _ = launch("train_dpo", *extra, "--output_dir", tmp_path / "run0")
    assert whole[2]["lcpo_eta"] > 0.9 and rest[-1]["lcpo_eta"] == whole[-1]["lcpo_eta"] > whole[2]["lcpo_eta"]


def test_draw_by_variance():
    """MMR1: the share of the draws that go by variance is as asked, each row's chance among them its variance's share, a
    row of 0 has none; a draw depends on its number alone, and without an estimate it is the plan's."""
    def drawn(*args):
        plan, draws, seed, share, variance = args
        row_of = METHODS["variance_sampling"].row_of
        return list(row_of(Namespace(seed=seed, variance_sampling=share), plan, draws, {"variance": variance}))

    plan, draws = list(range(100, 1100)), range(1000)
    assert drawn(plan, draws, 0, 0.5, {}) == drawn(plan, draws, 0, 0.5, {"3": 0.0}) == plan
    variance = {"7": 0.0, "5": 0.1, "6": 0.3, "9": 0.0}
    assert drawn(plan, draws, 0, 0.0, variance) == plan
    rows = drawn(plan, draws, 0, 0.5, variance)
    counts = Counter(row for row in rows if row < 100)
    assert counts.keys() == {5, 6} and abs(counts.total() - 500) < 50 and abs(counts[6] / counts.total() - 0.75) < 0.06
    assert all(row in (5, 6, planned) for row, planned in zip(rows, plan))
    assert drawn(plan, range(30, 40), 0, 0.5, variance) == rows[30:40]
    assert drawn(plan, draws, 1, 0.5, variance) != rows


def test_variance_sampling(launch, task, tmp_path, capsys):
    """MMR1: the share of the draws that go by variance takes it from the rewards last logged for each row, of all rollouts
    before; the others are the plan's; the run says what it costs."""
    metrics, _ = launch("train_grpo", *grpo(task), "--per_device_train_batch_size", 16, "--max_steps", 4,
                        "--algo", "grpo", "variance_sampling")
    assert "variance sampling: no rollout more, but an epoch leaves out 50% of its rows" in capsys.readouterr().err
    args = Namespace(seed=0, variance_sampling=0.5)
    plan, variance, drawn = data.Plan([12], 16, 0)[:], {}, []
    for step, m in enumerate(metrics, 1):
        rows = rows_of_step(tmp_path / "run0", step)
        draws = range(4 * step - 4, 4 * step)
        expected = METHODS["variance_sampling"].row_of(args, plan, draws, {"variance": variance})
        assert rows[::4] == list(expected) and m["epoch"] == pytest.approx(step / 3)
        lines = [json.loads(line)["rewards"]["spread"] for line in open(tmp_path / "run0" / "completions" / f"step_{step}.jsonl")]
        variance |= {str(row): float(torch.tensor(lines[4 * p:4 * p + 4]).double().var(correction=0))
                     for p, row in enumerate(rows[::4])}
        drawn += rows[::4]
    assert drawn[:4] == plan[:4] and drawn != plan and len(set(drawn)) < 12


def test_a_guide_of_another_vocabulary_is_refused(launch, folders):
    """TGDPO compares the two models token by token: with other ids that would be noise."""
    with pytest.raises(model.InputError, match="another vocabulary"):
        launch("train_dpo", "--algo", "tgdpo", "--guide_model", folders["llava"], "--max_steps", 1)


def test_a_changed_guide_is_refused(folders, tmp_path):
    """A run that goes on with other weights behind the same --guide_model path would train on another loss."""
    shutil.copytree(folders["llama"], tmp_path / "guide")
    args = train_dpo.parse_args(["--algo", "tgdpo", "--guide_model", str(tmp_path / "guide")])
    before = model.describe_run(args, 1)
    model.check_unchanged(before, model.describe_run(args, 1), [])
    with open(tmp_path / "guide" / "model.safetensors", "r+b") as file:  # the last weights, other ones
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    with pytest.raises(model.InputError, match="model: .*model.safetensors"):
        model.check_unchanged(before, model.describe_run(args, 1), [])


def test_gtpo_gets_its_weights_and_the_starting_entropy(launch, task, monkeypatch):
    """The script's part of GTPO: weights of conflict tokens times the other masks, and the entropy of step 1 (at which
    nothing is dropped: it is not known yet) at every later step; without it no completion would ever be dropped."""
    args = train_grpo.parse_args(["--algo", "gtpo", "off_policy_mask", "--num_generations", "2", "--off_policy_mask_threshold", "0.5"])
    mask, ids = torch.ones(4, 2).bool(), torch.tensor([[5, 6], [5, 7], [5, 6], [5, 7]])
    micro = dict(completion_ids=ids, completion_mask=mask, advantages=torch.tensor([1.0, -1, 1, -1]),
                 sampling_logps=torch.tensor([[-1.0, -1], [-1, -1], [-1, -1], [0, 0]]))
    logps = torch.full((4, 2), -1.0)
    keep = train_grpo.weigh_tokens(args, logps, logps, logps, micro)["keep"]
    assert keep.tolist() == [[2, 1], [0, 1], [2, 1], [0, 0]]
    known, policy_loss = [], losses.policy_loss
    monkeypatch.setattr(losses, "policy_loss", lambda *a, **k: (known.append(k["initial_entropy"]), policy_loss(*a, **k))[1])
    metrics, _ = launch("train_grpo", *grpo(task, "--algo", "gtpo"), "--per_device_train_batch_size", 4, "--max_steps", 3)
    assert known == [None, metrics[0]["entropy"], metrics[0]["entropy"]] and metrics[1]["entropy"] != metrics[0]["entropy"]


def test_reference_follows_the_policy(monkeypatch, tmp_path, task):
    """moving_reference: after the second step and the fourth the reference is 0.25 policy + 0.75 itself."""
    monkeypatch.chdir(tmp_path)
    steps, loaded, load = capture(monkeypatch), [], model.load_policy
    monkeypatch.setattr(model, "load_policy", lambda *a, **k: (loaded.append(load(*a, **k)), loaded[-1])[1])
    monkeypatch.setattr(rollout, "RewardRunner", InProcess)
    train_grpo.main(flags(task, *grpo(task), "--algo", "grpo", "moving_reference", "--beta", 0.1, "--ref_model_sync_steps", 2,
                          "--ref_model_mixup_alpha", 0.25, "--per_device_train_batch_size", 8, "--max_steps", 5,
                          "--output_dir", "out"))
    ref = loaded[1][0]
    start, second, fourth = steps[0][0], steps[2][0], steps[4][0]
    for p, a, b, c in zip(ref.parameters(), start, second, fourth, strict=True):
        torch.testing.assert_close(p, 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c)


def test_a_moving_reference_of_lora_is_refused(capsys):
    """There are no reference weights to move: the reference is the model without its adapter."""
    with pytest.raises(SystemExit):
        train_grpo.parse_args(["--algo", "grpo", "moving_reference", "--lora_r", "8", "--beta", "0.1"])
    assert "moving_reference cannot go with --lora_r" in capsys.readouterr().err


# --- every file of papers/


COMMANDS = {name: re.findall(r"^    python (train_\w+\.py) (.*?)(?:  +#.*)?$", method.__doc__, re.M)
            for name, method in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_file_says_what_it_is(name):
    """A file of papers/ has a source, commands that parse, the script that they run, and a row of METHODS.md; it is short."""
    method, text = METHODS[name], (ROOT / "papers" / f"{name}.py").read_text()
    assert method.__doc__ and text.startswith('"""') and text.count("\n") < 100
    assert re.search(r"^Source: .*\d{4}\.\d{5}", method.__doc__, re.M) or name == "weighted"  # which is no paper's
    assert COMMANDS[name] and max(map(len, text.splitlines())) <= 110
    for file, arguments in COMMANDS[name]:
        args = SCRIPTS[file.removesuffix(".py")].parse_args(shlex.split(arguments))
        assert file == method.SCRIPT and name in args.algo and args.methods[args.algo.index(name) - len(args.algo)] is method
    named = {word for code in re.findall(r"`([^`]+)`", (ROOT / "METHODS.md").read_text()) for word in code.split()}
    assert name in named and name in papers.papers_for(method.SCRIPT)


def test_every_hook_is_called():
    """What a file defines is a hook that some loop calls, a value that one asks for, or used in the file; GUIDE.md lists all."""
    source = "".join((ROOT / file).read_text() for file in ("papers/__init__.py", "model.py", "train_dpo.py", "train_grpo.py"))
    hooks = {*re.findall(r'hooks\(\w+, "(\w+)"', source), *re.findall(r'getattr\((?:m|method|lead), "([A-Z]\w+)"', source),
             *papers.TABLES, "SCRIPT", "Flags"}
    fork = (ROOT / "GUIDE.md").read_text().split("## Fork it")[1].split("\n## ")[0]
    assert hooks == set(re.findall(r"\w+", fork)) & hooks and len(hooks) > 20
    for name, method in METHODS.items():
        own = {key for key, value in vars(method).items()
               if key.isupper() or inspect.isfunction(value) and value.__module__ == method.__name__}
        unused = {key for key in own - hooks if len(re.findall(rf"\b{key}\b", re.sub(r'""".*?"""', "", inspect.getsource(method),
                                                                                  flags=re.S))) < 2}
        assert not unused, (name, unused)


def run_of(name, task, folders):
    """(script, flags) of two steps of a file's first command, on the rows of the tests."""
    (file, arguments), *_ = COMMANDS[name]
    extra = ["--dataset", task / "columns.jsonl", "--model_name_or_path", "tiny"] if file == "train_dpo.py" else [*grpo(task), "--steps_per_generation", 2]
    extra += ["--guide_model", folders["qwen2_5_vl"]] if name == "tgdpo" else []
    extra += ["--weight_column", "trust"] if name == "weighted" else []
    return file.removesuffix(".py"), [*shlex.split(arguments), *extra, "--max_steps", 2, "--per_device_train_batch_size", 4]


QUICK = ("wpo", "disco", "f_dpo", "moving_reference", "high_entropy")


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in METHODS])
def test_every_file_trains(launch, task, name, capsys, folders, tmp_path):
    """Two updates of each file's command: finite numbers, a gradient, the preset's settings, and a start as it must be."""
    script, arguments = run_of(name, task, folders)
    metrics, _ = launch(script, *arguments)
    said, used = capsys.readouterr().out, json.loads((tmp_path / "run0" / "args.json").read_text())
    for key, value in getattr(METHODS[name], "PRESET", {}).items():
        assert key == "learning_rate" or used[key] == value
    assert len(metrics) == 2 and all(m["grad_norm"] > 0 for m in metrics)
    for m in metrics:
        assert all(abs(x) < 1e7 for x in m.values()), m  # nan compares False; reg_grpo divides its gradient by 1e-4
    for measured, expected in re.findall(r"(\S+) \(expected ([0-9.]+)\)", said):
        assert float(measured) == pytest.approx(float(expected), abs=2e-4 + 1e-4 * float(expected)), said


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    ["dpo", "ld_dpo", "--ld_alpha", 0.3], ["dpo", "wpo"], ["dpo", "f_dpo", "--f_divergence_type", "forward_kl"],
    ["dpo", "f_dpo", "--f_divergence_type", "alpha_divergence", "--f_alpha_divergence_coef", 0.2]])
def test_every_option_of_papers_reaches_the_loss(launch, arguments):
    """F45: a flag that is parsed and then not passed on changes nothing. Each gives a second step of its own."""
    others = [["dpo"], arguments, *([arguments[:-2]] if "--f_alpha_divergence_coef" in arguments else [])]
    losses_ = [launch("train_dpo", "--algo", *algo, "--max_steps", 2)[0][1]["loss"] for algo in others]
    for other in losses_[:1] + losses_[2:]:
        assert losses_[1] != pytest.approx(other, rel=1e-4)


def test_wpo_weighs_a_pair_by_both_answers():
    """exp(mean(log p - log sum p^2)) of each side, multiplied: 2^-1 of the chosen answer times 2^-3 of the rejected one.
    The weight of one answer alone passed all other tests."""
    pair = {f"mask_{side}": torch.ones(1, 2, dtype=torch.bool) for side in "wl"}
    pair |= {f"log_sum_sq_probs_{side}": torch.zeros(1, 2, **F64) for side in "wl"}
    pair |= {"logps_w": math.log(2) * torch.tensor([[-0.5, -1.5]], **F64), "logps_l": math.log(2) * torch.tensor([[-2.0, -4]], **F64)}
    assert METHODS["wpo"].pair_weights(pair, None, None).item() == pytest.approx(2.0 ** -4)


# --- files combine


@pytest.mark.parametrize("script, arguments", [
    ("train_dpo", ["mpo", "lcpo", "--loss_type", "sigmoid", "lcpo", "sft"]), ("train_grpo", ["gspo", "variance_sampling"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("train_dpo", ["mpo", "ld_dpo", "wpo"]), ("train_dpo", ["mpo", "wpo", "ld_dpo"]),
        ("train_dpo", ["dpo", "ld_dpo", "f_dpo", "--f_divergence_type", "js_divergence"]),
        ("train_grpo", ["gtpo", "high_entropy", "variance_sampling"])))])
def test_files_combine(launch, task, script, arguments):
    """What a further file adds acts beside what stands before it: the run differs from that without it, and goes on to train."""
    extra = [*grpo(task), "--steps_per_generation", 2, "--max_steps", 6] if script == "train_grpo" else ["--max_steps", 2]
    extra += ["--per_device_train_batch_size", 4]
    both, _ = launch(script, "--algo", *arguments, *extra)
    count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    for without in range(1, count):
        less = arguments[:without] + arguments[without + 1:]
        less = less[:-2] if arguments[without] == "f_dpo" else less  # its flags go with it
        less = less[:count - 1] if arguments[without] == "lcpo" else less
        one, _ = launch(script, "--algo", *less, *extra)
        assert [m["loss"] for m in one] != [m["loss"] for m in both], less
    assert all(m["grad_norm"] > 0 for m in both)


def test_combinations_are_the_formula():
    """LD-DPO's sums reach every loss of the mix, WPO's weights those of pairs alone; f-DPO scores LD-DPO's log-ratios."""
    batch = pair_batch()
    w, l = [0.5 + 0.5 * -0.5, 0.75 + 0.5 * 0.25], [-1.0, -0.5]  # as in test_ld_dpo_weighs_the_tail_of_the_longer_answer
    terms, _ = preference_losses(["sigmoid", "bco_pair", "sft"], *batch, beta=0.1, ld_alpha=0.5, pair_weights=torch.tensor([2.0, 3.0]))
    assert terms["sigmoid"][0].item() == pytest.approx(sum(-c * log(sigma(0.1 * (a - b))) for c, a, b in zip((2, 3), w, l)))
    assert terms["bco_pair"][0].item() == pytest.approx(
        sum(-c * (log(sigma(0.1 * a)) + log(sigma(-0.1 * b))) for c, a, b in zip((2, 3), w, l)))
    assert terms["sft"][0].item() == pytest.approx(3 / 2 + 1.5 / 3)
    terms, _ = preference_losses(["sigmoid"], *batch, beta=0.1, ld_alpha=0.5, f_divergence_type="forward_kl")
    assert terms["sigmoid"][0].item() == pytest.approx(sum(-log(sigma(0.1 * (exp(-b) - exp(-a)))) for a, b in zip(w, l)))


# --- one's own file, outside the repository


@pytest.mark.slow
def test_ones_own_file_is_as_good(launch, task, tmp_path, folders):
    """A copy of a file of papers/, elsewhere and under another name, gives the same run to the bit: a pair loss with STATE, a
    further model, a policy term with token weights, an advantage, a sampler of prompts, a reference that moves."""
    for name in ("lcpo", "tgdpo", "gtpo", "ngrpo", "variance_sampling", "moving_reference"):
        mine = tmp_path / f"my_{name}.py"
        shutil.copyfile(ROOT / "papers" / f"{name}.py", mine)
        script, arguments = run_of(name, task, folders)
        arguments += ["--ref_model_sync_steps", 1] if name == "moving_reference" else []
        whole, grads = launch(script, *arguments)
        own, own_grads = launch(script, *[mine if word == name else word for word in arguments])
        assert [{k: v for k, v in m.items() if not k.endswith("_time")} for m in own] == \
               [{k: v for k, v in m.items() if not k.endswith("_time")} for m in whole], name
        assert all(torch.equal(a, b) for ours, theirs in zip(own_grads, grads, strict=True) for a, b in zip(ours, theirs))


OWN = '''"""A file of one's own."""

from losses import Advantage, GroupLoss, PolicyLoss, has_spread

SCRIPT = "train_grpo.py"
STATE = {"steps_done": 0}


class Flags:
    my_scale: float = 1.0  # what all is multiplied by


def term(ratio, A, *, my_scale, steps_done, **_):
    return -ratio * A * my_scale * (steps_done + 1)


def of_group(r, u, s, n, *, my_scale, steps_done, **_):
    return -(r * s).sum(-1) * my_scale * (steps_done + 1)


def advantage(rewards, num_generations, *, my_scale, steps_done, **_):
    return (rewards - rewards.mean()) * my_scale * (steps_done + 1)


TABLE


def after_step(state, metrics):
    metrics["steps_done"] = state["steps_done"]
    state["steps_done"] += 1
'''
ENTRIES = {"policy": ('POLICY_LOSSES = {"mine": PolicyLoss(term, "token")}', ["--loss_type", "mine"]),
           "group": ('GROUP_LOSSES = {"mine": GroupLoss(of_group, has_spread, reference=False)}',
                     ["--loss_type", "mine", "--advantage_estimator", "none"]),
           "advantage": ('ADVANTAGES = {"mine": Advantage(advantage)}', ["--advantage_estimator", "mine"])}


@pytest.mark.parametrize("kind", ENTRIES)
def test_flags_and_state_reach_ones_own_functions(launch, task, tmp_path, kind):
    """Each table's functions take the file's own flags and STATE by name: twice the flag is twice the gradient, and a second
    step at the same weights (learning rate 0) has twice the first one's factor. A typo of the flag is an error."""
    entry, chosen = ENTRIES[kind]
    (tmp_path / "mine.py").write_text(OWN.replace("TABLE", entry))
    extra = [*grpo(task), "--algo", "grpo", tmp_path / "mine.py", *chosen, "--per_device_train_batch_size", 4, "--max_steps", 2,
             "--learning_rate", 0, "--num_iterations", 2]
    _, one = launch("train_grpo", *extra)
    metrics, two = launch("train_grpo", *extra, "--my_scale", 2)
    assert [m["steps_done"] for m in metrics] == [0, 1]
    assert_same(two[0], [2 * x for x in one[0]], 1e-5)
    assert any(x.any() for x in one[0])
    # An advantage is computed once a rollout, by the state of its start.
    assert_same(one[1], one[0] if kind == "advantage" else [2 * x for x in one[0]], 1e-5)
    with pytest.raises(SystemExit):
        launch("train_grpo", *extra, "--my_scal", 2)
    losses.POLICY_LOSSES.pop("mine", None), losses.GROUP_LOSSES.pop("mine", None), losses.ADVANTAGES.pop("mine", None)


class Dead(BaseException):
    """Stands for a kill."""


def test_state_of_ones_own_file_survives_a_kill(task, tmp_path, monkeypatch):
    """STATE stands in the checkpoint: killed after step 3 and started again, the numbers and weights are those of a run that
    was left alone, and code/ has the file that ran."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.py"
    shutil.copyfile(ROOT / "papers" / "lcpo.py", mine)

    def start(output):
        train_dpo.main(flags(task, "--algo", mine, "--beta", 1, "--max_steps", 5, "--save_steps", 2, "--output_dir", output,
                             "--per_device_train_batch_size", 4))
        lines = [json.loads(line) for line in open(f"{output}/metrics.jsonl")]
        return ([{k: v for k, v in m.items() if not k.endswith("_time")} for m in lines],
                load_file(f"{output}/final/model.safetensors"))

    whole, weights = start("whole")
    def deadly(metrics):
        if metrics["step"] == 3:
            raise Dead

    undo = after_log(monkeypatch, deadly)
    with pytest.raises(Dead):
        start("killed")
    undo()
    text = mine.read_text()
    rest, same = start("killed")
    assert rest == whole and len({m["lcpo_eta"] for m in whole[1:]}) == 5
    assert weights.keys() == same.keys() and all(torch.equal(weights[k], same[k]) for k in same)
    assert (tmp_path / "killed" / "code" / "papers" / "0-mine.py").read_text() == text


def test_the_code_digest_covers_every_file(tmp_path, capsys):
    """Of papers/ and of one's own; two of one name do not hide each other. A run that goes on with another file says so."""
    mine = tmp_path / "lcpo.py"
    shutil.copyfile(ROOT / "papers" / "lcpo.py", mine)
    mine.write_text(mine.read_text() + "\n# mine\n")
    arguments = ["--algo", "mpo", "ld_dpo", str(mine), "--loss_type", "lcpo"]
    args = train_dpo.parse_args(arguments)
    assert {"papers/__init__.py", "papers/ld_dpo.py", "papers/1-lcpo.py"} == {name for name in model.code_of(args) if name.startswith("papers/")}
    before = model.describe_run(args, 1)
    model.check_unchanged(before, model.describe_run(train_dpo.parse_args(arguments), 1), [])
    assert "other code" not in "".join(capsys.readouterr())
    mine.write_text(mine.read_text() + "\n# changed\n")
    model.check_unchanged(before, model.describe_run(train_dpo.parse_args(arguments), 1), [])
    assert "resumed with other code than it was started with" in "".join(capsys.readouterr())


@pytest.mark.parametrize("script, arguments, message", [
    ("train_grpo", ["--top_entropy_quantile", "0.2"], "--top_entropy_quantile; it comes with --algo grpo high_entropy"),
    ("train_grpo", ["--algo", "gspo", "--variance_sampling=0.5"], "it comes with --algo gspo variance_sampling"),
    ("train_dpo", ["--ld_alpha", "0.2"], "it comes with --algo mpo ld_dpo"),
    ("train_dpo", ["--algo", "gtpo"], "error: --algo gtpo is for train_grpo.py"),
    ("train_grpo", ["--algo", "grpo", "lcpo"], "error: --algo lcpo is for train_dpo.py"),
    ("train_dpo", ["--algo", "ddpo"], "error: --algo ddpo: neither a preset nor a file of papers/"),
    ("train_dpo", ["--algo", "nowhere/mine.py"], "error: --algo nowhere/mine.py: no such file"),
    ("train_dpo", ["--algo", "mpo", "dpo"], "dpo is a preset, and so can only stand first"),
    ("train_dpo", ["--algo", ","], "--algo names no method")])
def test_algo_says_what_is_wrong(script, arguments, message, capsys):
    """F45: a flag without its file, a file of the other script, one that is not there, two presets."""
    with pytest.raises(SystemExit) as error:
        SCRIPTS[script].parse_args(arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("text, message", [
    ("", "does not say which script it is for"), ('SCRIPT = "train_grpo.py"', "mine.py is for train_grpo.py"),
    ('SCRIPT = "train_dpo.py"\nclass Flags:\n    beta: float = 1.0  # of mine', "--beta is there already"),
    ('SCRIPT = "train_dpo.py"\nimport nothing_of_the_sort', "nothing_of_the_sort")])
def test_ones_own_file_is_checked(tmp_path, text, message):
    """A file without SCRIPT, for the other script, or with a flag that is there already; what it raises itself is shown."""
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises((SystemExit, ImportError), match=message):
        train_dpo.parse_args(["--algo", str(tmp_path / "mine.py")])


def test_state_has_names_of_its_own(tmp_path):
    """STATE of the name of a flag, of the run's own numbers or of another file's would overwrite these."""
    for name in ("beta", "step", "eta"):
        (tmp_path / "mine.py").write_text(f'SCRIPT = "train_dpo.py"\nSTATE = {{"{name}": 0.0}}\n')
        args = train_dpo.parse_args(["--algo", "lcpo", str(tmp_path / "mine.py")])
        with pytest.raises(model.InputError, match=f"STATE '{name}' is the name of another number or flag"):
            model.with_states(args, {"step": 0})


def test_a_weight_column_of_any_name(launch, task, tmp_path):
    """A column called as a flag or as a tensor of the losses weighs pairs, and is nothing else."""
    rows = [json.loads(line) for line in open(task / "columns.jsonl")]
    runs = []
    for name in ("trust", "beta", "r_w"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | {name: row["trust"]}) + "\n" for row in rows))
        runs.append(launch("train_dpo", "--algo", "dpo", "weighted", "--weight_column", name, "--dataset", tmp_path / f"{name}.jsonl",
                           "--max_steps", 2, "--per_device_train_batch_size", 4)[0])
    assert [m["loss"] for m in runs[0]] == [m["loss"] for m in runs[1]] == [m["loss"] for m in runs[2]]


def test_the_guides_file_trains(launch, tmp_path):
    """The example of GUIDE.md, as a reader copies it: its margin rises, its flag acts, it starts where it says."""
    fork = (ROOT / "GUIDE.md").read_text().split("## Fork it")[1].split("\n## ")[0]
    (tmp_path / "margin.py").write_text(re.search(r"```python\n(.*?)```", fork, re.S)[1])
    extra = ["--algo", tmp_path / "margin.py", "--max_steps", 3, "--per_device_train_batch_size", 4]
    metrics, _ = launch("train_dpo", *extra)
    assert [m["target"] for m in metrics] == pytest.approx([0, 0.01, 0.02])
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    other, _ = launch("train_dpo", *extra, "--target_scale", 9)
    assert other[0]["loss"] == metrics[0]["loss"] and other[1]["loss"] > metrics[1]["loss"]
    losses.PAIR_LOSSES.pop("margin_dpo")


def test_a_file_without_a_loss_says_what_may_stand_before_it(capsys):
    """f_dpo changes another loss's log-ratios and brings none: alone it was told only that `--loss_type names no loss`."""
    with pytest.raises(SystemExit):
        train_dpo.parse_args(["--algo", "f_dpo", "--f_divergence_type", "forward_kl"])
    assert "--algo f_dpo brings none: a preset may stand before it, as in --algo dpo f_dpo" in capsys.readouterr().err
