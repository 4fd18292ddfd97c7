"""Closed-form values and gradients of every loss and advantage, in fp64, with numbers worked out by hand."""

import math

import pytest
import torch

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
    loss = losses.bco_pair_loss(r_w, r_l, beta=beta, delta=delta)
    expected = math.log1p(math.exp(-(beta * w - delta))) + math.log1p(math.exp(beta * l - delta))
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    loss.sum().backward()
    assert r_w.grad.item() == pytest.approx(-beta * sigma(-(beta * w - delta)), abs=1e-12)
    assert r_l.grad.item() == pytest.approx(beta * sigma(beta * l - delta), abs=1e-12)


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
    terms, metrics = losses.preference_losses(["sigmoid", "bco_pair", "sft"], chosen, cm, rejected, rm, ref_chosen,
                                              ref_rejected, beta=0.1, delta=0.05)
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
    terms, metrics = losses.preference_losses(["sigmoid", "bco_pair"], chosen, cm, rejected, rm, chosen.detach(),
                                              rejected.detach(), beta=0.1, delta=0.0)
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
        losses.preference_losses(["sigmiod"], torch.zeros(1, 1), torch.ones(1, 1).bool(), beta=0.1)


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


def test_group_of_one_is_refused():
    """The std of one sample is nan: GRPO on groups of one is an error, not a run of nan."""
    with pytest.raises(ValueError, match="num_generations"):
        losses.group_advantages(torch.rand(3), 1)
    with pytest.raises(ValueError, match="scale_rewards"):
        losses.group_advantages(torch.rand(4), 2, scale_rewards="batch")


# --- policy loss

CLIP = dict(epsilon=0.2, epsilon_high=0.3, max_completion_length=10)


def policy(logps, old, A, mask, level="token", loss_type="grpo", **kwargs):
    return losses.policy_loss(logps, old, A, mask, importance_sampling_level=level, loss_type=loss_type,
                              **{**CLIP, **kwargs})


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
    ("grpo", [1 / 4, 1 / 2, 1], 3), ("dapo", [1, 1, 1], 7), ("dr_grpo", [1, 1, 1], 30)])
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


def test_kl_term():
    """k3 = e^u - u - 1 with u = log ref - log pi; its gradient as a loss is 1 - e^u. nan padding stays out."""
    logps, old, A, mask = policy_batch()
    ref = (logps.detach() - 0.2).masked_fill(~mask, math.nan)
    loss, metrics = policy(logps, logps.detach(), torch.zeros(3, **F64), mask, loss_type="dapo", ref_logps=ref, beta=0.5)
    k3 = math.exp(-0.2) + 0.2 - 1
    assert loss.item() == pytest.approx(0.5 * 7 * k3) and metrics["kl"][0].item() == pytest.approx(7 * k3)
    (grad,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(grad, torch.where(mask, 0.5 * (1 - math.exp(-0.2)), 0.0).double())


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
    lambda: losses.policy_loss_count("gpro", torch.ones(1, 1).bool(), 5)])
def test_unknown_choices_raise(call):
    """mlx-lm-lora #55: an unknown level fell through to a log-ratio of zero and exactly no gradient."""
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", losses.POLICY_LOSSES)
def test_gradcheck_policy(loss_type, level):
    """Autograd against finite differences, off-policy, with KL."""
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


def test_exact_policy_gradient():
    """P2: over all sequences of a tiny categorical policy, the loss's expected gradient is that of E[r], exactly."""
    V, T = 3, 3
    torch.manual_seed(1)
    theta = torch.randn(T, V, **F64, requires_grad=True)
    sequences = torch.cartesian_prod(*[torch.arange(V)] * T)                        # (27, 3)
    rewards = torch.rand(len(sequences), **F64)
    logps = theta.log_softmax(-1)[torch.arange(T), sequences]                       # (27, 3)
    p = logps.sum(-1).exp()
    true = torch.autograd.grad((p * rewards).sum(), theta, retain_graph=True)[0]
    baseline = (p * rewards).sum().detach()
    # probability times advantage stands for sampling; dr_grpo sums tokens, so no length enters
    loss, _ = policy(logps, logps.detach(), p.detach() * (rewards - baseline), torch.ones(27, T).bool(),
                     loss_type="dr_grpo")
    ours = torch.autograd.grad(-loss, theta)[0]
    torch.testing.assert_close(ours, true, atol=1e-12, rtol=1e-9)


def test_k3_value_and_gradient_exactly():
    """P3: enumerated over a categorical pi, k3's mean is KL(pi || ref) and its mean gradient that of KL(ref || pi)."""
    torch.manual_seed(0)
    theta, ref = torch.randn(5, **F64, requires_grad=True), torch.randn(5, **F64).log_softmax(-1)
    log_pi = theta.log_softmax(-1)
    pi, k3 = log_pi.exp(), losses.k3_kl(log_pi, ref)
    torch.testing.assert_close((pi * k3).sum(), (pi * (log_pi - ref)).sum(), atol=1e-12, rtol=0)
    ours = torch.autograd.grad((pi.detach() * k3).sum(), theta, retain_graph=True)[0]
    forward_kl = (ref.exp() * (ref - log_pi)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(forward_kl, theta)[0], atol=1e-12, rtol=0)
