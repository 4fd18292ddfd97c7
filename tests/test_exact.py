"""Exact enumeration: over every completion of a tiny autoregressive policy, expectations are sums, so that a loss's expected
gradient can be held against the gradient of what it claims to optimise, to 1e-9."""

import itertools

import pytest
import torch

import losses
import rollout

F64 = dict(dtype=torch.float64)
V, T, EOS = 4, 3, 0


def completions():
    """Every completion that ends with EOS or after T tokens: ids (C, T), mask (C, T)."""
    found = {}
    for ids in itertools.product(range(V), repeat=T):
        length = ids.index(EOS) + 1 if EOS in ids else T
        found[ids[:length]] = None
    ids = torch.tensor([list(y) + [EOS] * (T - len(y)) for y in found])
    mask = torch.tensor([[t < len(y) for t in range(T)] for y in found])
    return ids, mask


IDS, MASK = completions()
PREVIOUS = torch.cat([torch.full((len(IDS), 1), V), IDS[:, :-1]], 1)  # the token before; V at the start


class World:
    """A policy theta (T, V + 1, V): logits by position and token before; a reference, a sampler, a reward."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.theta = torch.randn(T, V + 1, V, **F64, requires_grad=True)
        self.other, self.rewards = self.theta.detach() + 0.5 * torch.randn(T, V + 1, V, **F64), torch.rand(len(IDS), **F64)

    def logps(self, theta):
        """(C, T), nan on padding."""
        log_p = theta.log_softmax(-1)[torch.arange(T), PREVIOUS, IDS]
        return torch.where(MASK, log_p, torch.nan)

    def p(self, logps):
        return losses.masked_sum(logps, MASK).exp()

    def grad(self, x):
        return torch.autograd.grad(x, self.theta, retain_graph=True)[0]

    def loss(self, logps, old, weights, loss_type="dr_grpo", level="token", **kwargs):
        """The sum over completions, each with the advantage `weights`: probability times advantage stands for sampling."""
        value, _ = losses.policy_loss(logps, old, weights, MASK, loss_type=loss_type, importance_sampling_level=level,
                                      **{**dict(epsilon=1e6, epsilon_high=1e6), **kwargs})
        return value


def test_the_enumeration_is_complete():
    """Probabilities of all completions sum to one, so nothing is missing from the expectations below."""
    world = World()
    assert len(IDS) == 1 + 3 + 9 * 4 and world.p(world.logps(world.theta)).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("loss_type, level", [
    ("dr_grpo", "token"), ("dapo", "token"), ("cispo", "token"), ("vespo", "token"), ("luspo", "sequence"),
    ("dr_grpo", "sequence_token"), ("grpo", "sequence_sum"), ("sapo", "sequence_sum"), ("bnpo", "token")])
def test_policy_gradient_is_exact(loss_type, level):
    """P2: on policy, the expected gradient of the loss is that of the expected reward, whatever the baseline."""
    world = World()
    logps = world.logps(world.theta)
    p = world.p(logps)
    true = world.grad((p * world.rewards).sum())
    for baseline in ((p * world.rewards).sum().detach(), 0.3):
        ours = world.grad(-world.loss(logps, logps.detach(), p.detach() * (world.rewards - baseline), loss_type, level))
        scale = MASK.sum() if loss_type == "bnpo" else 1  # its mean is over all tokens given
        torch.testing.assert_close(ours * scale, true, atol=1e-12, rtol=1e-9)


def test_only_the_ratio_of_the_sequence_is_exact_off_policy():
    """Samples of an old policy: RLOO's ratio gives the gradient of the new policy's expected reward exactly; the token
    ratio leaves out what an earlier token does to later ones."""
    world = World()
    logps, old = world.logps(world.theta), world.logps(world.other)
    true = world.grad((world.p(logps) * world.rewards).sum())
    weights = world.p(old) * (world.rewards - 0.4)
    ours = world.grad(-world.loss(logps, old, weights, "grpo", "sequence_sum"))
    torch.testing.assert_close(ours, true, atol=1e-12, rtol=1e-9)
    token = world.grad(-world.loss(logps, old, weights, "dr_grpo", "token"))
    assert (token - true).abs().max() > 1e-3


def test_only_the_correction_of_the_sequence_is_exact():
    """Samples of another engine: weighed by the probability of the whole completion the gradient is exact, by the token
    it is not; without a weight it is far off."""
    world = World()
    logps, sampled = world.logps(world.theta), world.logps(world.other)
    true = world.grad((world.p(logps) * world.rewards).sum())
    weights = world.p(sampled) * (world.rewards - 0.4)
    errors = {}
    for mode in ("sequence_truncate", "token_truncate", None):
        correction = mode and losses.sampler_correction(logps, sampled, MASK, mode, clip_max=None, clip_min=0.0)
        ours = world.grad(-world.loss(logps, logps.detach(), weights, correction=correction))
        errors[mode] = (ours - true).abs().max().item()
    assert errors["sequence_truncate"] < 1e-12 and errors["token_truncate"] > 1e-3 and errors[None] > 1e-3


def test_rloo_is_unbiased_with_the_kl_in_its_reward():
    """Over all pairs of completions (G = 2), RLOO's expected gradient is that of E[r] - beta KL(pi || ref) exactly,
    though its KL is a detached k1 in the reward."""
    world = World()
    logps, ref, beta = world.logps(world.theta), world.logps(world.other), 0.3
    p = world.p(logps)
    kl = (p * losses.masked_sum(logps - ref, MASK)).sum()
    true = world.grad((p * world.rewards).sum() - beta * kl)
    C = len(IDS)
    first, second = torch.arange(C).repeat_interleave(C), torch.arange(C).repeat(C)
    both = torch.stack([first, second], 1).flatten()                                             # (C * C * 2,)
    penalty = beta * losses.masked_sum(losses.kl_penalty(logps.detach(), ref, "k1"), MASK)
    A = losses.advantages("rloo", world.rewards[None, both], torch.ones(1, **F64), 2, penalty=penalty[both])
    weights = (p[first] * p[second]).detach().repeat_interleave(2) / 2
    value, _ = losses.policy_loss(logps[both], logps.detach()[both], weights * A, MASK[both], loss_type="grpo",
                                  importance_sampling_level="sequence_sum")
    torch.testing.assert_close(world.grad(-value), true, atol=1e-12, rtol=1e-9)


def categorical(seed=0):
    torch.manual_seed(seed)
    theta, ref = torch.randn(5, **F64, requires_grad=True), torch.randn(5, **F64).log_softmax(-1)
    return theta, theta.log_softmax(-1), ref


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_value_and_gradient(kind):
    """P3, over one categorical pi: k1 and k3 have the mean KL(pi || ref), k2 has not. Gradients as losses: k1 none at
    all, k2 that of KL(pi || ref), k3 that of KL(ref || pi); times the ratio k1 and k3 follow KL(pi || ref)."""
    theta, log_pi, ref = categorical()
    pi, k = log_pi.exp(), losses.kl_penalty(log_pi, ref, kind)
    reverse, forward = (pi * (log_pi - ref)).sum(), (ref.exp() * (ref - log_pi)).sum()

    def grad(x):
        return torch.autograd.grad(x, theta, retain_graph=True)[0]

    def close(a, b):
        return torch.allclose(a, b, atol=1e-12, rtol=1e-9)

    mean = (pi.detach() * k).sum()
    assert close(mean, reverse) == (kind != "k2")
    plain = {"k1": torch.zeros(5, **F64), "k2": grad(reverse), "k3": grad(forward)}[kind]
    assert close(grad(mean), plain)
    ratio = (log_pi - log_pi.detach()).exp()
    corrected = grad((pi.detach() * k * ratio).sum())
    assert close(corrected, grad((pi * k).sum()))
    assert close(corrected, grad(reverse)) == (kind != "k2")
    assert not close(grad(forward), grad(reverse))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_of_the_whole_completion(kind):
    """As policy_loss adds it: with the token's ratio the gradient is that of the sum of the per-token KLs at fixed
    prefixes, with the ratio of the whole sequence that of KL(pi(y) || ref(y)), exactly."""
    world = World()
    logps, ref = world.logps(world.theta), world.logps(world.other)
    p = world.p(logps)
    whole = world.grad((p * losses.masked_sum(logps - ref, MASK)).sum())
    log_pi, log_ref = world.theta.log_softmax(-1), world.other.log_softmax(-1)
    kl_at = (log_pi.exp() * (log_pi - log_ref)).sum(-1)[torch.arange(T), PREVIOUS]                # (C, T), of a prefix
    fixed = world.grad((p.detach() * losses.masked_sum(kl_at, MASK)).sum())
    # weights p in the loss: beta = 1, no advantage, each completion repeated with its probability by a correction-free sum
    grads = {}
    for level in ("token", "sequence_sum"):
        total = sum(p[i].detach() * losses.policy_loss(
            logps[i:i + 1], logps[i:i + 1].detach(), torch.zeros(1, **F64), MASK[i:i + 1], loss_type="dr_grpo",
            importance_sampling_level=level, ref_logps=ref[i:i + 1], beta=1.0, kl_estimator=kind)[0] for i in range(len(IDS)))
        grads[level] = world.grad(total)
    torch.testing.assert_close(grads["token"], fixed, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(grads["sequence_sum"], whole, atol=1e-12, rtol=1e-9)
    assert (whole - fixed).abs().max() > 1e-3


def test_entropy_and_nll_gradients_are_likelihoods():
    """Maximum likelihood: over all completions weighed by a target, the token NLL's gradient is that of the
    cross-entropy, so its minimum is the target itself."""
    world = World()
    target = world.p(world.logps(world.other))
    total = sum(target[i] * losses.nll_loss(world.logps(world.theta)[i:i + 1], MASK[i:i + 1], normalization="token")[0]
                for i in range(len(IDS)))
    world.theta.data.copy_(world.other)
    at_target = sum(target[i] * losses.nll_loss(world.logps(world.theta)[i:i + 1], MASK[i:i + 1], normalization="token")[0]
                    for i in range(len(IDS)))
    assert world.grad(at_target).abs().max() < 1e-12 and total > at_target


@pytest.mark.slow
def test_monte_carlo_agrees_with_enumeration():
    """P4: 200,000 completions drawn by the sampler's own inverse CDF and keyed uniforms: mean reward, k1, k3 and a gradient
    entry within 5 standard errors of the sums over all completions."""
    world, n = World(), 200_000
    uniforms = rollout.keyed_uniform(1, torch.arange(n)[:, None], torch.zeros(1, dtype=torch.long), torch.arange(T)[None])
    previous, alive, ids = torch.full((n,), V), torch.ones(n, dtype=torch.bool), []
    for t in range(T):
        token, _ = rollout.sample_tokens(world.theta.detach()[t][previous], uniforms[:, t])
        ids.append(torch.where(alive, token, EOS))
        previous, alive = token, alive & (token != EOS)
    key = torch.stack(ids, 1)
    index = (key[:, None, :] == IDS[None]).all(-1).int().argmax(1)                               # (n,) into completions
    logps, ref = world.logps(world.theta), world.logps(world.other)
    p = world.p(logps).detach()
    one_hot = torch.zeros(n, len(IDS), **F64).scatter_(1, index[:, None], 1.0).mean(0)           # frequencies
    quantities = {"reward": world.rewards, "k1": losses.masked_sum(losses.kl_penalty(logps, ref, "k1"), MASK).detach(),
                  "k3": losses.masked_sum(losses.kl_penalty(logps, ref, "k3"), MASK).detach()}
    entry = torch.stack([world.grad(losses.masked_sum(logps, MASK)[i])[1, 2, 3] for i in range(len(IDS))])
    quantities["gradient"] = entry * world.rewards
    for name, x in quantities.items():
        mean, sampled = (p * x).sum(), (one_hot * x).sum()
        error = ((p * (x - mean) ** 2).sum() / n).sqrt()
        assert abs(sampled - mean) < 5 * error, name
