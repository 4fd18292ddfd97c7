"""Closed-form values and gradients of every loss and advantage, in fp64, with numbers worked out by hand."""

import math

import pytest
import torch
from conftest import METHODS, preference_losses

import losses

ln2 = math.log(2)
F64 = dict(dtype=torch.float64)


def sigma(x):
    return 1 / (1 + math.exp(-x))


# --- preference losses


@pytest.mark.parametrize("w, l", [(0.0, 0.0), (1.5, -0.5), (-2.0, 3.0), (40.0, -40.0)])
def test_sigmoid_value_and_gradient(w, l):
    """DPO: value -log sigma(beta (w - l)); d/dw = -beta sigma(-beta (w - l)), d/dl the opposite. log 2 at the start."""
    beta = 0.3
    r_w, r_l = (torch.tensor([x], **F64, requires_grad=True) for x in (w, l))
    loss = losses.sigmoid_loss(r_w, r_l, beta=beta)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-beta * (w - l))), abs=1e-10)
    loss.sum().backward()
    slope = beta * sigma(-beta * (w - l))
    assert r_w.grad.item() == pytest.approx(-slope, abs=1e-12) and r_l.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.4, -1.0])
@pytest.mark.parametrize("w, l", [(0.0, 0.0), (1.5, -0.5), (-2.0, 3.0)])
def test_bco_pair_value_and_gradient(w, l, delta):
    """BCO is the sum of two halves (not their mean), shifted by delta in opposite directions; delta has no gradient."""
    beta = 0.3
    r_w, r_l = (torch.tensor([x], **F64, requires_grad=True) for x in (w, l))
    loss = losses.bco_pair_loss(r_w, r_l, beta=beta, bco_shift=delta)
    expected = math.log1p(math.exp(-(beta * w - delta))) + math.log1p(math.exp(beta * l - delta))
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    loss.sum().backward()
    assert r_w.grad.item() == pytest.approx(-beta * sigma(-(beta * w - delta)), abs=1e-12)
    assert r_l.grad.item() == pytest.approx(beta * sigma(beta * l - delta), abs=1e-12)


# Of each loss, by hand: value, d/dw and d/dl at chosen log-ratio w and rejected l, lengths 3 and 5, log-probs w - 7, l - 8.
B_, E_, TAU, GAMMA, NW, NL = 0.3, 0.1, 0.05, 0.6, 3, 5
log, exp = math.log, math.exp


def slope(x):
    return sigma(x) * sigma(-x)


def through_m(value, derivative):
    """Of a function of m = beta (w - l)."""
    return lambda w, l: (value(B_ * (w - l)), B_ * derivative(B_ * (w - l)), -B_ * derivative(B_ * (w - l)))


def through_means(value, derivative, offset=(0, 0)):
    """Of a function of x = w / n_w - l / n_l."""
    def at(w, l):
        x = (w + offset[0]) / NW - (l + offset[1]) / NL
        return value(x), derivative(x) / NW, -derivative(x) / NL
    return at


def discopop_slope(m):
    mu = sigma(m / TAU)
    return mu * (1 - mu) / TAU * (log(sigma(m)) + exp(-m)) - (1 - mu) * sigma(-m) - mu * exp(-m)


BY_HAND = {
    "sigmoid": through_m(lambda m: -(1 - E_) * log(sigma(m)) - E_ * log(sigma(-m)),
                         lambda m: -(1 - E_) * sigma(-m) + E_ * sigma(m)),
    "hinge": through_m(lambda m: max(0, 1 - m), lambda m: -1.0 if m < 1 else 0.0),
    "ipo": through_means(lambda x: (x - 1 / (2 * B_)) ** 2, lambda x: 2 * (x - 1 / (2 * B_))),
    "exo_pair": through_m(lambda m: (sigma(m) * log(sigma(m) / (1 - E_)) + sigma(-m) * log(sigma(-m) / E_)),
                          lambda m: slope(m) * (m - log(1 - E_) + log(E_))),
    "nca_pair": lambda w, l: (-log(sigma(B_ * w)) - log(sigma(-B_ * w)) / 2 - log(sigma(-B_ * l)) / 2,
                              -B_ * sigma(-B_ * w) + B_ / 2 * sigma(B_ * w), B_ / 2 * sigma(B_ * l)),
    "robust": through_m(lambda m: (-(1 - E_) * log(sigma(m)) + E_ * log(sigma(-m))) / (1 - 2 * E_),
                        lambda m: (-(1 - E_) * sigma(-m) - E_ * sigma(m)) / (1 - 2 * E_)),
    "sppo_hard": lambda w, l: ((w - 1 / (2 * B_)) ** 2 + (l + 1 / (2 * B_)) ** 2, 2 * w - 1 / B_, 2 * l + 1 / B_),
    "apo_zero": lambda w, l: (1 - sigma(B_ * w) + sigma(B_ * l), -B_ * slope(B_ * w), B_ * slope(B_ * l)),
    "apo_down": lambda w, l: (sigma(B_ * w) + 1 - sigma(B_ * (w - l)), B_ * (slope(B_ * w) - slope(B_ * (w - l))),
                              B_ * slope(B_ * (w - l))),
    "discopop": through_m(lambda m: -(1 - sigma(m / TAU)) * log(sigma(m)) + sigma(m / TAU) * exp(-m), discopop_slope),
    "sigmoid_norm": through_means(lambda x: -log(sigma(B_ * x)), lambda x: -B_ * sigma(-B_ * x)),
    "simpo": through_means(lambda x: -(1 - E_) * log(sigma(B_ * x - GAMMA)) - E_ * log(sigma(GAMMA - B_ * x)),
                           lambda x: B_ * (-(1 - E_) * sigma(GAMMA - B_ * x) + E_ * sigma(B_ * x - GAMMA)), (-7, -8))}


# What comes with the data: a pair's probabilities and margin; LCPO's eta; TGDPO's weighted log-ratios 1.2 w + 0.3, 0.7 l - 0.2.
# The methods of papers/ that take them are worked out in test_papers.py.
P_, PW, PL, MARGIN, ETA = 0.7, 0.8, 0.3, 1.7, 0.85
COLUMNS = dict(chosen_probs=torch.tensor(P_, **F64), chosen_probs_win=torch.tensor(PW, **F64),
               chosen_probs_lose=torch.tensor(PL, **F64), margin=torch.tensor(MARGIN, **F64),
               chosen_scores=torch.tensor(2.5, **F64), rejected_scores=torch.tensor(-1.5, **F64))


def pair_loss(name, r_w, r_l, **options):
    def tokens(*both):  # (B, 2): TGDPO's two tokens of an answer
        return torch.stack([torch.as_tensor(x, dtype=r_w.dtype).expand_as(r_w) for x in both], -1)

    mask, rhat = torch.ones(len(r_w), 2).bool(), 0.5 * B_  # alpha beta: of a guide's log-ratio to the reference
    defaults = dict(beta=B_, bco_shift=0.0, label_smoothing=E_, simpo_gamma=GAMMA, discopop_tau=TAU, s_w=r_w - 7, s_l=r_l - 8,
                    n_w=torch.tensor(NW), n_l=torch.tensor(NL), eta=ETA, mask_w=mask, mask_l=mask,
                    logps_w=tokens(r_w, 0.3), logps_l=tokens(r_l, -0.2), ref_logps_w=tokens(0, 0), ref_logps_l=tokens(0, 0),
                    guide_logps_w=tokens(0.2 / rhat, 0), guide_logps_l=tokens(0.3 / rhat, 0)) | COLUMNS
    return losses.PAIR_LOSSES[name].term(r_w, r_l, **defaults | options)


def check_by_hand(by_hand, name, w, l):
    r_w, r_l = (torch.tensor([x], **F64, requires_grad=True) for x in (w, l))
    loss = pair_loss(name, r_w, r_l)
    value, d_w, d_l = by_hand[name](w, l)
    assert loss.shape == (1,) and loss.item() == pytest.approx(value, abs=1e-10)
    grads = torch.autograd.grad(loss.sum(), (r_w, r_l))
    assert grads[0].item() == pytest.approx(d_w, abs=1e-10) and grads[1].item() == pytest.approx(d_l, abs=1e-10)


PAIRS_BY_HAND = [(0.0, 0.0), (1.5, -0.5), (-2.0, 3.0), (4.0, 0.1), (0.2, 0.25)]


@pytest.mark.parametrize("w, l", PAIRS_BY_HAND)
@pytest.mark.parametrize("name", BY_HAND)
def test_pair_losses_by_hand(name, w, l):
    """P1: value and both derivatives of each pair loss, worked out on paper, to 1e-10."""
    check_by_hand(BY_HAND, name, w, l)


OWN_TESTS = {"bco_pair", "aot", "aot_unpaired"}


def test_every_pair_loss_is_worked_out():
    """A loss added without its own derivation here, or for a file of papers/ in test_papers.py, fails."""
    of_papers = {name for method in METHODS.values() for name in getattr(method, "PAIR_LOSSES", {})}
    assert set(losses.PAIR_LOSSES) - of_papers == {*BY_HAND, *OWN_TESTS}


def test_aot_by_hand():
    """AOT compares quantiles, not pairs: both sides are sorted apart. The gradient goes to the pair that holds the rank."""
    s_w, s_l = torch.tensor([-1.0, -4.0], **F64, requires_grad=True), torch.tensor([-3.0, -2.0], **F64)
    ref_w, ref_l = torch.tensor([-2.0, -2.0], **F64), torch.tensor([-2.0, -3.0], **F64)
    loss = pair_loss("aot", s_w - ref_w, s_l - ref_l, s_w=s_w, s_l=s_l, label_smoothing=0.0)
    differences, ref_differences = [-2.0, 2.0], [0.0, 1.0]  # s_w - s_l is (2, -2), of the reference (0, 1)
    d = [a - b for a, b in zip(differences, ref_differences)]
    torch.testing.assert_close(loss, torch.tensor([-log(sigma(B_ * x)) for x in d], **F64))
    (grad,) = torch.autograd.grad(loss.sum(), s_w)
    torch.testing.assert_close(grad, torch.tensor([-B_ * sigma(-B_ * d[1]), -B_ * sigma(-B_ * d[0])], **F64))
    r_w, r_l = torch.tensor([1.0, -2.0], **F64, requires_grad=True), torch.tensor([-1.0, 1.0], **F64)
    loss = pair_loss("aot_unpaired", r_w, r_l)
    d = [-2.0 - -1.0, 1.0 - 1.0]
    torch.testing.assert_close(loss, torch.tensor([-(1 - E_) * log(sigma(B_ * x)) - E_ * log(sigma(-B_ * x)) for x in d],
                                                  **F64))
    (grad,) = torch.autograd.grad(loss.sum(), r_w)
    expected = [B_ * (-(1 - E_) * sigma(-B_ * x) + E_ * sigma(B_ * x)) for x in (d[1], d[0])]
    torch.testing.assert_close(grad, torch.tensor(expected, **F64))


def test_outliers_stay_finite_in_every_pair_loss():
    """A log-ratio of +-1000 gives a finite value and gradient: e^-m times a gate of 0 is nan (DiscoPOP)."""
    for name in losses.PAIR_LOSSES:
        for w, l in ((1000.0, -1000.0), (-1000.0, 1000.0)):
            r = torch.tensor([w, l], requires_grad=True)
            loss = pair_loss(name, *r.split(1)).sum()
            assert loss.isfinite() and torch.autograd.grad(loss, r)[0].isfinite().all(), name


def test_sorting_losses_refuse_pair_weights():
    """AOT sorts chosen and rejected apart: a weight would land on two answers of different pairs."""
    for name in losses.which(losses.PAIR_LOSSES, sorts=True):
        with pytest.raises(ValueError, match=name):
            preference_losses([name], *pair_batch(), beta=0.1, pair_weights=torch.ones(2))


def test_simpo_needs_no_reference():
    """simpo and sft run without reference log-probs, every other loss says that it cannot; simpo's rewards are
    beta times the mean log-prob."""
    chosen, cm, rejected, rm, *_ = pair_batch()
    terms, metrics = preference_losses(["simpo"], chosen, cm, rejected, rm, beta=2.0, simpo_gamma=1.0)
    means = [(-1.5, -3.0), (-0.5, -1.25)]
    assert terms["simpo"][0].item() == pytest.approx(sum(-log(sigma(2 * (a - b) - 1)) for a, b in means))
    assert metrics["rewards/margins"][0].item() == pytest.approx(sum(2 * (a - b) for a, b in means))
    for name in losses.which(losses.PAIR_LOSSES, reference=True):
        with pytest.raises(ValueError, match="reference"):
            preference_losses([name], chosen, cm, rejected, rm, beta=0.1, label_smoothing=0.1)


@pytest.mark.parametrize("name", sorted({*losses.PAIR_LOSSES, "sft"} - {"lcpo"}))  # its q is a constant to autograd
def test_gradcheck_preference(name):
    """Autograd against finite differences through tokens and masks, of every loss; the padding gets no gradient."""
    chosen, cm, rejected, rm, ref_chosen, ref_rejected = pair_batch()

    def loss(c, r):
        terms, _ = preference_losses([name], torch.where(cm, c, math.nan), cm, torch.where(rm, r, math.nan), rm,
                                            ref_chosen, ref_rejected, ref_chosen + 0.3, ref_rejected - 0.2, beta=0.3,
                                            bco_shift=0.1, label_smoothing=0.1, ld_alpha=0.7, **COLUMNS)
        return terms[name][0] / terms[name][1]

    clean = [torch.where(m, x, 0.0).detach().requires_grad_() for x, m in ((chosen, cm), (rejected, rm))]
    assert torch.autograd.gradcheck(loss, clean)
    grads = torch.autograd.grad(loss(*clean), clean, allow_unused=True)
    assert (grads[0] != 0).any() and (grads[0][~cm] == 0).all()
    assert name == "sft" or (grads[1] != 0).any()


def test_bco_delta_modes():
    """running is the mean over completed steps, ema starts at the first mean, none stays 0 (TRL); a typo raises."""
    rewards = [0.5, -0.1, 0.2, 0.6]
    running = ema = none = 0.0
    for t, r in enumerate(rewards):
        running = losses.next_bco_delta(running, r, t, "running")
        ema = losses.next_bco_delta(ema, r, t, "ema", ema_decay=0.9)
        none = losses.next_bco_delta(none, r, t, "none")
        assert running == pytest.approx(sum(rewards[:t + 1]) / (t + 1))
    assert ema == pytest.approx(0.9 * (0.9 * (0.9 * 0.5 - 0.01) + 0.02) + 0.06)
    assert none == 0.0
    with pytest.raises(ValueError, match="runing"):
        losses.next_bco_delta(0.0, 0.0, 0, "runing")


def pair_batch():
    """Two pairs, uneven lengths; the padding is nan, which must not reach value or gradient."""
    nan = math.nan
    chosen = torch.tensor([[-1.0, -2.0, nan], [-0.5, -0.25, -0.75]], **F64, requires_grad=True)
    rejected = torch.tensor([[-3.0, nan], [-1.0, -1.5]], **F64, requires_grad=True)
    ref_chosen = torch.tensor([[-1.5, -1.5, nan], [-1.0, -0.5, -1.0]], **F64)
    ref_rejected = torch.tensor([[-2.0, nan], [-1.0, -1.0]], **F64)
    masks = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), torch.tensor([[1, 0], [1, 1]]).bool()
    return chosen, masks[0], rejected, masks[1], ref_chosen, ref_rejected


def test_mpo_mix_by_hand():
    """0.8 sigmoid + 0.2 bco_pair + 1.0 sft on numbers worked out by hand: log-ratios are sums over tokens, the NLL is
    the per-response mean, and nan in the padding stays there."""
    chosen, cm, rejected, rm, ref_chosen, ref_rejected = pair_batch()
    terms, metrics = preference_losses(["sigmoid", "bco_pair", "sft"], chosen, cm, rejected, rm, ref_chosen,
                                              ref_rejected, beta=0.1, bco_shift=0.05)
    w, l = [0.0, 1.0], [-1.0, -0.5]  # chosen and rejected log-ratios
    sigmoid = sum(math.log1p(math.exp(-0.1 * (a - b))) for a, b in zip(w, l))
    bco = sum(math.log1p(math.exp(-(0.1 * a - 0.05))) + math.log1p(math.exp(0.1 * b - 0.05)) for a, b in zip(w, l))
    assert terms["sigmoid"][0].item() == pytest.approx(sigmoid) and terms["sigmoid"][1] == 2
    assert terms["bco_pair"][0].item() == pytest.approx(bco) and terms["bco_pair"][1] == 2
    assert terms["sft"][0].item() == pytest.approx(3 / 2 + 1.5 / 3) and terms["sft"][1] == 2
    sum(weight * terms[n][0] for n, weight in (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))).backward()
    assert chosen.grad[0, 2] == 0 and rejected.grad[0, 1] == 0
    expected = [-0.8 * 0.1 * sigma(-0.1 * (a - b)) - 0.2 * 0.1 * sigma(-(0.1 * a - 0.05)) - 1 / n
                for a, b, n in zip(w, l, (2, 3))]
    torch.testing.assert_close(chosen.grad[:, 0], torch.tensor(expected, **F64))
    margins = [0.1 * (a - b) for a, b in zip(w, l)]
    assert metrics["rewards/margins"][0].item() == pytest.approx(sum(margins))
    assert metrics["rewards/accuracies"] == (2, 2)


def test_start_values():
    """Policy = reference: sigmoid log 2, bco_pair 2 log 2, so MPO is 1.2 log 2 = 0.8318 + NLL; a tie counts 1/2."""
    chosen, cm, rejected, rm, *_ = pair_batch()
    terms, metrics = preference_losses(["sigmoid", "bco_pair"], chosen, cm, rejected, rm, chosen.detach(),
                                              rejected.detach(), beta=0.1, bco_shift=0.0)
    mean = {n: (s / c).item() for n, (s, c) in terms.items()}
    assert mean["sigmoid"] == pytest.approx(ln2) and mean["bco_pair"] == pytest.approx(2 * ln2)
    assert 0.8 * mean["sigmoid"] + 0.2 * mean["bco_pair"] == pytest.approx(0.8318, abs=5e-5)
    assert metrics["rewards/accuracies"][0] / metrics["rewards/accuracies"][1] == 0.5


def test_nll_normalizations():
    """sequence: every response weighs the same; token: every token does. An unknown one raises."""
    chosen, mask, *_ = pair_batch()
    value, count = losses.nll_loss(chosen, mask, normalization="token")
    assert value.item() == pytest.approx(4.5) and count == 5
    value.backward()
    assert torch.equal(chosen.grad, -mask.double())
    with pytest.raises(ValueError, match="normalization"):
        losses.nll_loss(chosen, mask, normalization="tokens")


def test_unknown_loss_raises():
    """A typo in loss_type must not train on nothing."""
    with pytest.raises(ValueError, match="sigmiod"):
        preference_losses(["sigmiod"], *2 * [torch.zeros(1, 1), torch.ones(1, 1).bool()], beta=0.1)


# --- advantages


def test_group_advantages_by_hand():
    """(r - mean) / (unbiased std + 1e-4) within each group of consecutive rows; no division with `none`."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 2.0, 2.0], **F64)
    scaled = losses.group_advantages(rewards, 4)
    std_a, std_b = math.sqrt(4 * 0.25 / 3), math.sqrt(2 / 3)
    torch.testing.assert_close(scaled[:4], torch.tensor([0.5, -0.5, -0.5, 0.5], **F64) / (std_a + 1e-4))
    torch.testing.assert_close(scaled[4:], torch.tensor([1.0, -1.0, 0.0, 0.0], **F64) / (std_b + 1e-4))
    plain = losses.group_advantages(rewards, 4, scale_rewards="none")
    torch.testing.assert_close(plain[4:], torch.tensor([1.0, -1.0, 0.0, 0.0], **F64))


def test_equal_rewards_give_exactly_zero():
    """Float noise of the mean must not be divided by a std of 1e-17; a spread of 1e-12 is noise, too."""
    for group in ([0.1] * 7, [1e30] * 7, [0.7, *[0.7 + 1e-12] * 6], [-1 / 3] * 7):
        assert (losses.group_advantages(torch.tensor(group, **F64), 7) == 0).all()


def test_abstaining_rewards():
    """nan (every function abstained) gets advantage 0 and stays out of mean and std; a whole group of nan is zeros."""
    nan = math.nan
    A = losses.group_advantages(torch.tensor([1.0, 0.0, nan, 2.0, nan, nan, nan, nan], **F64), 4)
    torch.testing.assert_close(A[[0, 1, 3]], torch.tensor([0.0, -1.0, 1.0], **F64) / (1 + 1e-4))
    assert A[2] == 0 and (A[4:] == 0).all()


def test_advantages_follow_a_permutation():
    """P10: permuting completions permutes advantages; an affine change of rewards changes nothing but eps."""
    rewards = torch.rand(3, 5, **F64)
    order = torch.stack([torch.randperm(5) for _ in range(3)])
    A = losses.group_advantages(rewards.flatten(), 5).view(3, 5)
    permuted = losses.group_advantages(rewards.gather(1, order).flatten(), 5).view(3, 5)
    torch.testing.assert_close(permuted, A.gather(1, order))
    torch.testing.assert_close(losses.group_advantages((3 * rewards - 7).flatten(), 5, eps=0.0),
                               losses.group_advantages(rewards.flatten(), 5, eps=0.0))


def test_batch_std_by_hand():
    """scale_rewards batch: each group's own mean, but one std, of all rewards that are known."""
    nan = math.nan
    rewards = torch.tensor([1.0, 0.0, nan, 3.0, 5.0, 5.0], **F64)
    A = losses.group_advantages(rewards, 3, scale_rewards="batch")
    known = [1.0, 0.0, 3.0, 5.0, 5.0]
    mean = sum(known) / 5
    std = math.sqrt(sum((r - mean) ** 2 for r in known) / 4)
    centred = torch.tensor([0.5, -0.5, 0.0, -4 / 3, 2 / 3, 2 / 3], **F64)
    torch.testing.assert_close(A, centred / (std + 1e-4))


def test_rloo_by_hand():
    """RLOO: each reward minus the mean of the others; those that abstained are no others; one alone gets 0."""
    nan = math.nan
    A = losses.rloo_advantages(torch.tensor([1.0, 0.0, 5.0, 2.0, nan, 4.0, nan, nan, 7.0], **F64), 3)
    expected = [1 - 2.5, 0 - 3.0, 5 - 0.5, 2 - 4.0, 0.0, 4 - 2.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(A, torch.tensor(expected, **F64))


def test_gdpo_by_hand():
    """GDPO: every function is normalised within the group before the weighted sum, then over the batch: a reward a
    thousand times as large does not drown the other (in GRPO it does)."""
    scores = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2000.0, 0.0, 4000.0, 4000.0]], **F64)
    weights = torch.tensor([1.0, 0.5], **F64)
    A = losses.gdpo_advantages(scores, weights, 2)
    first, second = math.sqrt(0.5), math.sqrt(2e6)
    z = torch.tensor([0.5 / (first + 1e-4) + 0.5 * 1000 / (second + 1e-4)] * 1 + [0.0] * 3, **F64)
    z[1], z[2], z[3] = -z[0], -0.5 / (first + 1e-4), 0.5 / (first + 1e-4)  # the second function has no spread there
    torch.testing.assert_close(A, z / (z.std() + 1e-4))
    scaled = losses.gdpo_advantages(scores * torch.tensor([[1.0], [1e-3]]), weights, 2)
    torch.testing.assert_close(A, scaled, atol=1e-3, rtol=0)
    grpo = losses.group_advantages(losses.weighted_rewards(scores, weights), 2)
    assert grpo[2] == pytest.approx(-grpo[3].item()) and (grpo[:2].abs() - A[:2].abs()).abs().max() > 0.01


def test_no_estimator_is_the_reward_below_the_highest():
    """`none`: what GROUP_LOSSES compare; 0 is full marks, nan stays unknown, the penalty comes off."""
    scores = torch.tensor([[1.0, 0.0, math.nan], [1.0, 1.0, math.nan]], **F64)
    penalty = torch.tensor([0.0, 0.2, 0.0], **F64)
    got = losses.advantages("none", scores, torch.tensor([1.0, 0.5], **F64), 3, penalty=penalty)
    torch.testing.assert_close(got, torch.tensor([0.0, -1.2, math.nan], **F64), equal_nan=True)


def test_weighted_rewards_skip_who_abstained():
    """None of one function leaves the sum of the others; None of all is nan, not 0."""
    nan = math.nan
    scores = torch.tensor([[1.0, nan, nan], [2.0, 4.0, nan]], **F64)
    total = losses.weighted_rewards(scores, torch.tensor([1.0, 0.25], **F64))
    torch.testing.assert_close(total, torch.tensor([1.5, 1.0, nan], **F64), equal_nan=True)


@pytest.mark.parametrize("estimator, scale", [("grpo", "group"), ("grpo", "batch"), ("grpo", "none"), ("rloo", None),
                                              ("gdpo", None), ("dgpo", None)])
def test_every_estimator_keeps_the_promises(estimator, scale):
    """A group without spread is exactly 0 (0.1 seven times has a mean that is not 0.1); an abstention is 0; permuting
    completions permutes advantages; each group of known rewards sums to 0; inputs stay; the dtype stays."""
    torch.manual_seed(0)
    scores = torch.rand(2, 21, **F64)
    scores[:, :7] = torch.tensor([[0.1], [0.7]])
    scores[:, 9], scores[0, 16] = math.nan, math.nan
    kept, weights = scores.clone(), torch.tensor([1.0, 2.0], **F64)
    A = losses.advantages(estimator, scores, weights, 7, scale_rewards=scale)
    assert A.dtype == torch.float64 and A.shape == (21,) and A.isfinite().all()
    assert (A[:7] == 0).all() and A[9] == 0 and (A[10:] != 0).all()
    torch.testing.assert_close(A.view(3, 7).sum(-1), torch.zeros(3, **F64))
    torch.testing.assert_close(scores, kept, equal_nan=True, rtol=0, atol=0)
    order = torch.cat([g * 7 + torch.randperm(7) for g in (2, 0, 1)])  # groups, and completions in them
    permuted = losses.advantages(estimator, scores[:, order], weights, 7, scale_rewards=scale)
    torch.testing.assert_close(permuted, A[order])


def test_penalty_is_taken_off_the_reward():
    """RLOO's KL is part of the reward: it moves the baseline of the others as well."""
    rewards, penalty = torch.tensor([[1.0, 0.0, 2.0]], **F64), torch.tensor([0.5, 0.0, 0.0], **F64)
    A = losses.advantages("rloo", rewards, torch.ones(1, **F64), 3, penalty=penalty)
    torch.testing.assert_close(A, torch.tensor([0.5 - 1.0, 0.0 - 1.25, 2.0 - 0.25], **F64))
    with pytest.raises(ValueError, match="ppo"):
        losses.advantages("ppo", rewards, torch.ones(1, **F64), 3)


def test_group_of_one_is_refused():
    """The std of one sample is nan: GRPO on groups of one is an error, not a run of nan."""
    with pytest.raises(ValueError, match="num_generations"):
        losses.group_advantages(torch.rand(3), 1)
    with pytest.raises(ValueError, match="scale_rewards"):
        losses.group_advantages(torch.rand(4), 2, scale_rewards="btach")


# --- policy loss

CLIP = dict(epsilon=0.2, epsilon_high=0.3)


def policy(logps, old, A, mask, level="token", loss_type="grpo", **kwargs):
    return losses.policy_loss(logps, old, A, mask, importance_sampling_level=level, loss_type=loss_type,
                              **{"entropies": torch.zeros_like(old), "initial_entropy": None, **CLIP, **kwargs})


@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0])
def test_clip_geometry(ratio, A):
    """P5: the gradient is exactly zero where the pessimistic bound is active, for both signs of A (rasbt's maximum for
    A < 0 cuts it at ratio 1.5 and keeps it at 0.5), and -ratio * A elsewhere."""
    logps = torch.tensor([[math.log(ratio)]], **F64, requires_grad=True)
    mask = torch.ones(1, 1).bool()
    loss, metrics = policy(logps, torch.zeros(1, 1, **F64), torch.tensor([A], **F64), mask)
    clipped = min(max(ratio, 0.8), 1.3)
    assert loss.item() == pytest.approx(-min(ratio * A, clipped * A))
    loss.backward()
    low, high = A < 0 and ratio < 0.8, A > 0 and ratio > 1.3
    assert logps.grad.item() == pytest.approx(0.0 if low or high else -ratio * A)
    assert metrics["clip_ratio/low_mean"][0] == low and metrics["clip_ratio/high_mean"][0] == high


def policy_batch():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    logps = (torch.randn(3, 4, **F64) * 0.3 - 1).masked_fill(~mask, math.nan)
    old = (logps + 0.1 * torch.randn(3, 4, **F64)).masked_fill(~mask, math.nan)
    return logps.requires_grad_(), old, torch.tensor([1.0, -0.5, 2.0], **F64), mask


@pytest.mark.parametrize("loss_type, weights, count", [
    ("grpo", [1 / 4, 1 / 2, 1], 3), ("dapo", [1, 1, 1], 7), ("dr_grpo", [1, 1, 1], 30), ("luspo", [1, 1, 1], 3),
    ("bnpo", [1 / 7, 1 / 7, 1 / 7], 1)])
def test_aggregations_by_hand(loss_type, weights, count):
    """How tokens are averaged, with nan as padding: value, gradient and the count the sum is divided by."""
    logps, old, A, mask = policy_batch()
    loss, _ = policy(logps, old, A, mask, loss_type=loss_type, epsilon=9.0, epsilon_high=9.0)
    rows = [-A[i] * (logps[i] - old[i])[mask[i]].exp().sum() * weights[i] for i in range(3)]
    torch.testing.assert_close(loss, sum(rows))
    (grad,) = torch.autograd.grad(loss, logps)
    expected = [[-float(A[i] * torch.exp(logps[i, t] - old[i, t]).detach()) * weights[i] if mask[i, t] else 0.0
                 for t in range(4)] for i in range(3)]
    torch.testing.assert_close(grad, torch.tensor(expected, **F64))
    assert losses.policy_loss_count(loss_type, mask, 10) == count


def test_sequence_ratio_is_the_geometric_mean():
    """GSPO: one ratio exp(mean log-ratio) for the sequence; every token's gradient is s A / |y|, the same for all."""
    logps, old, A, mask = policy_batch()
    loss, metrics = policy(logps, old, A, mask, level="sequence", epsilon=9.0, epsilon_high=9.0)
    s = [(logps[i] - old[i])[mask[i]].mean().exp() for i in range(3)]
    torch.testing.assert_close(loss, -sum(s[i] * A[i] for i in range(3)))
    (grad,) = torch.autograd.grad(loss, logps)
    for i in range(3):
        expected = torch.where(mask[i], -s[i] * A[i] / mask[i].sum(), 0.0)
        torch.testing.assert_close(grad[i], expected.detach())


def test_sequence_clip_acts_on_the_whole_sequence():
    """A sequence outside GSPO's narrow clip loses the gradient of all its tokens, also of those whose ratio is 1."""
    old, mask = torch.zeros(2, 2, **F64), torch.ones(2, 2).bool()
    logps = torch.tensor([[0.002, 0.0], [0.0002, 0.0]], **F64, requires_grad=True)
    loss, metrics = policy(logps, old, torch.ones(2, **F64), mask, level="sequence", epsilon=3e-4, epsilon_high=4e-4)
    loss.backward()
    assert (logps.grad[0] == 0).all() and (logps.grad[1] != 0).all()
    assert metrics["clip_ratio/high_mean"] == (2, 4)


def test_on_policy_gradients_agree():
    """old = logps detached: the ratio is 1, the value is -A, and token and sequence level have the same gradient, the
    plain policy gradient -A / |y|, also with a bound of zero width."""
    logps, _, A, mask = policy_batch()
    grads = []
    for level in ("token", "sequence"):
        loss, metrics = policy(logps, logps.detach(), A, mask, level=level)
        assert loss.item() == pytest.approx(-A.sum().item())
        assert metrics["ratio"][0] / metrics["ratio"][1] == 1 and metrics["clip_ratio/region_mean"][0] == 0
        grads.append(torch.autograd.grad(loss, logps)[0])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grads[0], torch.where(mask, (-A / mask.sum(-1))[:, None], 0.0))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kind, value, derivative", [
    ("k1", 0.2, 1.0), ("k2", 0.02, 0.2), ("k3", exp(-0.2) + 0.2 - 1, 1 - exp(-0.2))])
def test_kl_term(kind, value, derivative, corrected):
    """d = log pi - log ref = 0.2 on every token: value and derivative of each estimator; times the ratio (1 here) the
    value stays and the derivative gains the value. nan padding stays out."""
    logps, old, A, mask = policy_batch()
    ref = (logps.detach() - 0.2).masked_fill(~mask, math.nan)
    loss, metrics = policy(logps, logps.detach(), torch.zeros(3, **F64), mask, loss_type="dapo", ref_logps=ref, beta=0.5,
                           kl_estimator=kind, use_bias_correction_kl=corrected)
    assert loss.item() == pytest.approx(0.5 * 7 * value) and metrics["kl"][0].item() == pytest.approx(7 * value)
    (grad,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(grad, torch.where(mask, 0.5 * (derivative + corrected * value), 0.0).double())


@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.9, 4.1, 9.0])
def test_two_sided_clip(ratio, A):
    """INTELLECT-2's delta bounds the ratio where A < 0, where PPO's bound does not; its tokens count as clipped."""
    logps = torch.tensor([[log(ratio)]], **F64, requires_grad=True)
    loss, metrics = policy(logps, torch.zeros(1, 1, **F64), torch.tensor([A], **F64), torch.ones(1, 1).bool(), delta=4.0)
    assert loss.item() == pytest.approx(-min(min(ratio, 4.0) * A, min(max(ratio, 0.8), 1.3) * A))
    (grad,) = torch.autograd.grad(loss, logps)
    off = (A > 0 and ratio > 1.3) or (A < 0 and (ratio < 0.8 or ratio > 4.0))
    assert grad.item() == pytest.approx(0.0 if off else -ratio * A) and metrics["clip_ratio/region_mean"][0] == off


@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 9.0])
def test_soft_policy_terms_by_hand(ratio, A):
    """CISPO, SAPO and VESPO: value and gradient on one token; no token loses its whole gradient."""
    old, mask = torch.tensor([[-1.0]], **F64), torch.ones(1, 1).bool()
    logps = torch.tensor([[log(ratio) - 1]], **F64, requires_grad=True)
    tau, (k, lam) = (1.0, (2, 3)) if A > 0 else (1.05, (3, 2))
    phi = exp(lam) * ratio**k * exp(-lam * ratio)
    expected = {"cispo": (-min(ratio, 5.0) * A * (log(ratio) - 1), -min(ratio, 5.0) * A),
                "sapo": (-4 / tau * sigma(tau * (ratio - 1)) * A, -4 * slope(tau * (ratio - 1)) * A * ratio),
                "vespo": (-phi * A * (log(ratio) - 1), -phi * A)}
    for name, (value, derivative) in expected.items():
        loss, _ = policy(logps, old, torch.tensor([A], **F64), mask, loss_type=name, epsilon_high=5.0)
        (grad,) = torch.autograd.grad(loss, logps)
        assert loss.item() == pytest.approx(value) and grad.item() == pytest.approx(derivative) and derivative != 0


def test_vespo_weighs_the_whole_sequence():
    """VESPO's weight is that of the product of all ratios, and of the sampler's correction where there is one."""
    logps, old, A, mask = policy_batch()
    correction = torch.full((3, 4), 1.1, **F64)
    for extra, factor in ((None, 0.0), (correction, log(1.1))):
        loss, _ = policy(logps, old, A, mask, loss_type="vespo", correction=extra)
        (grad,) = torch.autograd.grad(loss, logps)
        for i in range(3):
            k, lam = (2, 3) if A[i] > 0 else (3, 2)
            log_w = ((logps[i] - old[i])[mask[i]] + factor).sum().item()
            phi = exp(lam + k * log_w - lam * exp(log_w))
            torch.testing.assert_close(grad[i], torch.where(mask[i], -phi * A[i], 0.0))


def test_gspo_token_has_the_value_of_the_sequence_and_the_gradient_of_the_token():
    """sequence_token: the ratio's value is GSPO's s, each token's gradient s A / |y| comes through its own log-prob, so
    with one advantage per completion both have one value and one gradient, clipped tokens included."""
    logps, old, A, mask = policy_batch()
    for epsilon in (9.0, 0.01):
        results = [policy(logps, old, A, mask, level=level, epsilon=epsilon, epsilon_high=epsilon)
                   for level in ("sequence", "sequence_token")]
        grads = [torch.autograd.grad(loss, logps)[0] for loss, _ in results]
        torch.testing.assert_close(results[0][0], results[1][0])
        torch.testing.assert_close(*grads)
        assert results[0][1]["clip_ratio/region_mean"][0] == results[1][1]["clip_ratio/region_mean"][0]
    assert results[0][1]["clip_ratio/region_mean"][0] > 0


def test_sequence_sum_is_the_product():
    """RLOO's ratio is that of the whole sequence, and so is its clip; every token's gradient is c A."""
    logps, old, A, mask = policy_batch()
    loss, metrics = policy(logps, old, A, mask, level="sequence_sum", epsilon=9.0, epsilon_high=9.0)
    c = [(logps[i] - old[i])[mask[i]].sum().exp() for i in range(3)]
    torch.testing.assert_close(loss, -sum(c[i] * A[i] for i in range(3)))
    (grad,) = torch.autograd.grad(loss, logps)
    for i in range(3):
        torch.testing.assert_close(grad[i], torch.where(mask[i], -c[i] * A[i], 0.0).detach())


@pytest.mark.parametrize("level", losses.RATIO_LEVELS)
@pytest.mark.parametrize("loss_type", losses.POLICY_LOSSES)
def test_every_choice_has_a_gradient(loss_type, level):
    """mlx-lm-lora #55: one level had exactly no gradient. On policy, each is -A times the weight of its mean."""
    logps, _, A, mask = policy_batch()
    loss, _ = policy(logps, logps.detach(), A, mask, level, loss_type, epsilon_high=5.0)
    (grad,) = torch.autograd.grad(loss, logps)
    lengths = mask.sum(-1, keepdim=True)
    weight = {"sequence": 1 / lengths, "micro_batch": torch.tensor(1 / 7)}.get(losses.POLICY_LOSSES[loss_type].mean, 1.0)
    if level == "sequence_sum" and loss_type not in ("cispo", "vespo", "gmpo"):
        weight = weight * lengths  # the ratio of the whole sequence stands at each of its tokens
    torch.testing.assert_close(grad, torch.where(mask, -A[:, None] * weight, 0.0))


def test_keep_and_correction_weigh_the_policy_term_only():
    """Dropped tokens lose their policy gradient, and keep their KL; a correction scales the one and not the other."""
    logps, old, A, mask = policy_batch()
    ref = (logps.detach() - 0.2).masked_fill(~mask, math.nan)
    kwargs = dict(loss_type="dapo", epsilon=9.0, epsilon_high=9.0, ref_logps=ref, beta=0.5)
    (plain,) = torch.autograd.grad(policy(logps, old, A, mask, **kwargs)[0], logps)
    (kl,) = torch.autograd.grad(policy(logps, old, 0 * A, mask, **kwargs)[0], logps)
    keep = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    (kept,) = torch.autograd.grad(policy(logps, old, A, mask, **kwargs, keep=keep)[0], logps)
    torch.testing.assert_close(kept, torch.where(keep, plain, kl))
    (scaled,) = torch.autograd.grad(policy(logps, old, A, mask, **kwargs, correction=torch.full((3, 4), 2.0))[0], logps)
    torch.testing.assert_close(scaled, 2 * (plain - kl) + kl)


@pytest.mark.parametrize("mode, expected", [
    ("token_truncate", [[2.0, 0.5], [3.0, 1.0]]), ("token_mask", [[2.0, 0.5], [0.0, 1.0]]),
    ("sequence_truncate", [[1.0, 1.0], [3.0, 3.0]]), ("sequence_mask", [[1.0, 1.0], [0.0, 0.0]])])
def test_sampler_correction_by_hand(mode, expected):
    """trainer / sampler probabilities, per token or as the product of the completion; above clip_max cut, or dropped."""
    old = torch.tensor([[2.0, 0.5, 1.0], [4.0, 1.0, 9.0]], **F64).log()
    sampled = torch.zeros(2, 3, **F64)
    old[:, 2], sampled[:, 2] = math.nan, math.nan
    mask = torch.tensor([[1, 1, 0]] * 2).bool()
    weights = losses.sampler_correction(old, sampled, mask, mode)
    torch.testing.assert_close(weights[:, :2], torch.tensor(expected, **F64))
    low = losses.sampler_correction(old, sampled, mask, "token_mask", clip_max=None, clip_min=0.9)
    torch.testing.assert_close(low[:, :2], torch.tensor([[2.0, 0.0], [4.0, 1.0]], **F64))
    with pytest.raises(ValueError, match="token_trunc"):
        losses.sampler_correction(old, sampled, mask, "token_trunc")


def test_outliers_stay_finite():
    """A log-ratio of +-100 (a bf16 outlier) must not overflow value or gradient."""
    logps = torch.tensor([[-100.0, -0.1]], requires_grad=True)
    for level in ("token", "sequence"):
        for A in (1.0, -1.0):
            loss, _ = policy(logps, torch.tensor([[-0.1, -100.0]]), torch.tensor([A]), torch.ones(1, 2).bool(), level,
                             ref_logps=torch.tensor([[-0.1, -100.0]]), beta=0.1)
            assert loss.isfinite() and torch.autograd.grad(loss, logps)[0].isfinite().all()


def test_fully_masked_row_contributes_nothing():
    """F44: a row without a trained token adds 0, not nan."""
    logps, old, A, mask = policy_batch()
    mask[1] = False
    for loss_type in losses.POLICY_LOSSES:
        loss, _ = policy(logps, old, A, mask, loss_type=loss_type)
        (grad,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite() and (grad[1] == 0).all()


def test_inputs_are_not_changed():
    """nano-aha wrote through a view into the labels: the normaliser went from 3 to 8."""
    logps, old, A, mask = policy_batch()
    before = [x.clone() for x in (logps, old, A, mask)]
    policy(logps, old, A, mask, level="sequence", ref_logps=old, beta=0.1)
    rewards = torch.rand(8)
    kept = rewards.clone()
    losses.group_advantages(rewards, 4)
    for a, b in zip(before, (logps, old, A, mask)):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert torch.equal(rewards, kept)


@pytest.mark.parametrize("call", [
    lambda: policy(*policy_batch(), level="sequences"),
    lambda: policy(*policy_batch(), loss_type="gpro"),
    lambda: policy(*policy_batch(), ref_logps=torch.zeros(3, 4), beta=0.1, kl_estimator="k4"),
    lambda: losses.policy_loss_count("gpro", torch.ones(1, 1).bool(), 5)])
def test_unknown_choices_raise(call):
    """mlx-lm-lora #55: an unknown level fell through to a log-ratio of zero and exactly no gradient."""
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("loss_type", [n for n in losses.POLICY_LOSSES if n not in ("cispo", "vespo")])
def test_gradcheck_policy(loss_type, level):
    """Autograd against finite differences, off-policy, with KL. (CISPO, VESPO and GSPO-token have a detached factor.)"""
    logps, old, A, mask = policy_batch()
    clean = [torch.where(mask, x, 0.0).detach() for x in (logps, old)]
    assert torch.autograd.gradcheck(
        lambda x: policy(x, clean[1], A, mask, level, loss_type, ref_logps=clean[1] - 0.1, beta=0.2)[0],
        clean[0].requires_grad_())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_sum_over_count_is_split_invariant(parts):
    """Sums over any cut into micro-batches add up to the same loss; micro-batch means would not."""
    logps, old, A, mask = policy_batch()
    whole, _ = policy(logps, old, A, mask, loss_type="grpo")
    cut = sum(policy(logps[i:i + parts], old[i:i + parts], A[i:i + parts], mask[i:i + parts])[0]
              for i in range(0, 3, parts))
    torch.testing.assert_close(whole, cut)


# --- losses of a group


def group_batch(seed=0):
    """Two groups of three completions of uneven length, nan padding: (logps, old, ref, mask), rewards below the highest."""
    torch.manual_seed(seed)
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 3, 2])[:, None]
    logps = (torch.randn(6, 4, **F64) * 0.3 - 1).masked_fill(~mask, math.nan)
    old, ref = (logps + 0.2 * torch.randn(6, 4, **F64) for _ in range(2))
    return logps.requires_grad_(), old, ref, mask, torch.tensor([0.0, -1.0, -0.4, -0.3, -1.1, -0.3], **F64)


def grouped(loss_type, logps, old, ref, mask, r, beta=0.3, G=3):
    loss, metrics = losses.group_loss(logps, old, r, mask, loss_type=loss_type, num_generations=G, ref_logps=ref, beta=beta)
    return loss, losses.policy_loss_count(loss_type, mask, 99, r, G), metrics


def summed(x, mask):
    return torch.where(mask, x, 0.0).sum(-1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_sum"])
def test_online_dpo_by_hand(loss_type):
    """The group's best (the first of equals) against its worst, by the pair loss of that name; the others have no gradient.
    OAIF, and unlike TRL a tie is no pair: it adds neither loss nor count, and is counted as skipped."""
    logps, old, ref, mask, r = group_batch()
    loss, count, metrics = grouped(loss_type, logps, old, ref, mask, r)
    u, n = summed(logps - ref, mask), mask.sum(-1)
    pairs = [(0, 1), (3, 4)]
    expected = 0
    for w, l in pairs:
        m = 0.3 * (u[w] - u[l])
        expected = expected + {"sigmoid": -torch.log(torch.sigmoid(m)), "ipo": (u[w] / n[w] - u[l] / n[l] - 1 / 0.6) ** 2,
                               "ipo_sum": (u[w] - u[l] - 1 / 0.6) ** 2}[loss_type]
    assert count == 2 and metrics["frac_groups_skipped"] == (0, 2)
    torch.testing.assert_close(loss, expected)
    (grad,), (theirs,) = torch.autograd.grad(loss, logps, retain_graph=True), torch.autograd.grad(expected, logps)
    torch.testing.assert_close(grad, theirs)
    assert (grad[[2, 5]] == 0).all() and (grad[[0, 1, 3, 4]][mask[[0, 1, 3, 4]]] != 0).all()
    tied = torch.tensor([-1.0, -1.0, -1.0 + 1e-9, math.nan, math.nan, -1.0], **F64)
    loss, count, metrics = grouped(loss_type, logps, old, ref, mask, tied)
    assert loss == 0 and count == 0 and metrics["frac_groups_skipped"] == (2, 2)
    (grad,) = torch.autograd.grad(loss, logps)
    assert (grad == 0).all()
    known = torch.tensor([math.nan, -1.0, -0.5, math.nan, -1.0, math.nan], **F64)  # an abstention is neither best nor worst
    loss, count, _ = grouped("sigmoid", logps, old, ref, mask, known)
    torch.testing.assert_close(loss, -torch.log(torch.sigmoid(0.3 * (u[2] - u[1]))))
    assert count == 1


def test_online_dpo_metrics():
    """rewards/margins and accuracies are over all pairs of different reward, a margin of 0 counts half."""
    logps, old, ref, mask, r = group_batch()
    *_, metrics = grouped("sigmoid", logps, old, ref, mask, r)
    u = 0.3 * summed(logps - ref, mask)
    margins = torch.stack([u[i] - u[j] for i, j in ((0, 1), (0, 2), (2, 1), (3, 4), (5, 4))])
    torch.testing.assert_close(metrics["rewards/margins"][0], margins.sum().detach())
    assert metrics["rewards/margins"][1] == 5 and metrics["rewards/accuracies"] == ((margins > 0).sum(), 5)
    *_, start = grouped("sigmoid", logps, old, logps.detach(), mask, r)
    assert start["rewards/accuracies"] == (2.5, 5) and start["kl"][0] == 0


@pytest.mark.parametrize("loss_type", losses.GROUP_LOSSES)
def test_gradcheck_group(loss_type):
    """Finite differences, off policy (disco within its bound: its penalty's gradient is not its value's)."""
    logps, old, ref, mask, r = group_batch()
    logps = logps.detach().nan_to_num(-1.0).requires_grad_()
    old = logps.detach() if loss_type == "disco" else old
    assert torch.autograd.gradcheck(lambda x: grouped(loss_type, x, old, ref, mask, r)[0], logps)


@pytest.mark.parametrize("loss_type", losses.GROUP_LOSSES)
def test_group_sums_and_counts_add_up(loss_type):
    """P9: two micro-batches of one group have the sum and the count of one of two groups; order within a group is free."""
    logps, old, ref, mask, r = group_batch()
    old = logps.detach() if loss_type == "disco" else old
    whole = grouped(loss_type, logps, old, ref, mask, r)
    halves = [grouped(loss_type, logps[i:i + 3], old[i:i + 3], ref[i:i + 3], mask[i:i + 3], r[i:i + 3]) for i in (0, 3)]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    assert whole[1] == halves[0][1] + halves[1][1]
    order = torch.tensor([2, 0, 1, 4, 3, 5])
    torch.testing.assert_close(grouped(loss_type, *(x[order] for x in (logps, old, ref, mask, r)))[0], whole[0])


def test_limits_are_where_they_are_said_to_be():
    """Numbers that no other test reached: a spread of a millionth is one, and of a billionth of the rewards none; a better
    answer is better by more than 1e-6; the highest reward counts positive weights alone; a bound of a mask belongs to it."""
    wide = torch.tensor([1000.0, 1000.5, 0, 1e-6, 1e9, 1e9 + 1], dtype=torch.float64)
    A = losses.group_advantages(wide, 2, scale_rewards="none")
    torch.testing.assert_close(A, torch.tensor([-0.25, 0.25, -5e-7, 5e-7, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert losses.is_above(torch.tensor([[0.0, 1e-3, 1e-3 + 1e-7]]))[0].tolist() == [[False] * 3, *[[True, False, False]] * 2]
    scores = torch.tensor([[1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    less_than_best = losses.advantages("none", scores, torch.tensor([1.0, -0.5], dtype=torch.float64), 2)
    assert less_than_best.tolist() == [-0.5, -0.5]
    logps, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for mode in ("token_mask", "sequence_mask"):
        assert losses.sampler_correction(logps, logps, mask, mode, 1.0, 1.0).tolist() == [[1.0, 1.0]]
