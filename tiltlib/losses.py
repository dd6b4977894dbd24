"""Losses for training a policy toward the tilt, and for showing where other losses lead.

Pure functions of log-probabilities and rewards. Each returns one number per sample, pair or group, not their mean, so
that a caller can average it, or sum it over every outcome with its probability and get the exact expected gradient.
Minimise `loss(...).mean()`. Rewards and log-ratios inside an advantage are constants; what is differentiated is said in
the first line of each formula. `sg` is "stop gradient".

Which one aims at pi* proportional to p exp(r / beta):

    policy_gradient, rloo        on fresh draws of the policy: the exact gradient of E r - beta KL(pi || p)
    dpo, bradley_terry           on any pairs that connect the outcomes, with Bradley-Terry labels
    weighted_likelihood          on draws of the reference, with weights exp(r / beta)
    grpo                         only with scale="none", and kl="reward" or, on whole-sequence ratios with
                                 baseline="leave-one-out", kl="k2"
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tiltlib import _checks

__all__ = [
    "KLEstimates",
    "bradley_terry",
    "count_wins",
    "dpo",
    "fit_bradley_terry",
    "grpo",
    "kl_estimators",
    "policy_gradient",
    "rloo",
    "self_certainty",
    "weighted_likelihood",
]


class KLEstimates(NamedTuple):
    """Three estimates of KL(pi || p) from draws of pi, per draw.

    Attributes:
        k1: -log rho, unbiased; its pathwise gradient has mean 0.
        k2: (log rho)^2 / 2, biased; its pathwise gradient has mean grad KL(pi || p).
        k3: rho - 1 - log rho, unbiased if p << pi, never negative; its pathwise gradient has mean grad KL(p || pi).
    """

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimators(logps: Tensor, ref_logps: Tensor) -> KLEstimates:
    """Estimate KL(pi || p) at draws of pi in three ways.

        k1 = -log rho,   k2 = (log rho)^2 / 2,   k3 = rho - 1 - log rho,        rho = p(y) / pi(y),  y ~ pi

    Differentiable in both arguments. Swapping them makes the mean of k3 chi2(pi || p) - KL(pi || p).

    Args:
        logps: log pi(y) of outcomes drawn from pi, any shape.
        ref_logps: log p(y) of the same outcomes, same shape.

    Returns:
        `KLEstimates(k1, k2, k3)`, each of the shape of `logps`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: values not finite or above 0, or shapes that differ.

    Source: [schulman2020]; book chapter 3, `kl-estimators`.
    """
    _draws(logps=logps, ref_logps=ref_logps)
    log_rho = ref_logps - logps
    return KLEstimates(-log_rho, log_rho**2 / 2, torch.expm1(log_rho) - log_rho)


def _draws(**logps: Tensor) -> None:
    """Require log-probabilities of drawn outcomes, of one shape."""
    for name, value in logps.items():
        _checks.log_values(name, value)
    _checks.same_shape(**logps)


def _rewarded(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> None:
    _draws(logps=logps, ref_logps=ref_logps)
    _checks.finite("rewards", rewards)
    _checks.same_shape(logps=logps, rewards=rewards)
    _checks.positive("beta", beta)


def policy_gradient(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, *, baseline: float | Tensor = 0.0
) -> Tensor:
    """Compute the REINFORCE loss of E r - beta KL(pi || p), at draws of the policy.

        loss = -log pi(y) sg[r - beta log(pi(y) / p(y)) - b]

    Its gradient has mean -grad (E r - beta KL), for any baseline b that does not depend on y. At pi = pi* the bracket
    is a constant: with that constant as baseline the gradient of every single draw vanishes there.

    Args:
        logps: log pi(y) of fresh draws, any shape; for sequences the sum over tokens.
        ref_logps: log p(y) of the same draws, same shape.
        rewards: r(y), same shape, finite.
        beta: KL coefficient in reward units, > 0.
        baseline: Number or tensor that broadcasts against `rewards`; not a function of the same draw.

    Returns:
        Loss per draw, shape of `logps`.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: values not finite, log-probabilities above 0, shapes that do not fit, or `beta` not finite and > 0.

    Source: [williams1992]; book chapter 3, `policy-gradient-tilt`.
    """
    _rewarded(logps, ref_logps, rewards, beta)
    level = torch.as_tensor(baseline, dtype=logps.dtype, device=logps.device)
    _checks.finite("baseline", level)
    _checks.fits("baseline", level, logps)
    advantages = rewards - beta * (logps - ref_logps) - level
    return -logps * advantages.detach()


def rloo(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Compute the leave-one-out policy gradient loss of E r - beta KL(pi || p), at groups of draws.

        loss = -(1/G) sum_i log pi(y_i) sg[R_i - (1/(G-1)) sum_{j != i} R_j],    R = r - beta log(pi / p)

    The others' mean does not depend on y_i, so the gradient is exactly unbiased. At pi* all R_i agree and it vanishes.

    Args:
        logps: log pi(y) of fresh draws, shape (..., G), G >= 2; for sequences the sum over tokens.
        ref_logps: log p(y) of the same draws, same shape.
        rewards: r(y), same shape, finite.
        beta: KL coefficient in reward units, > 0.

    Returns:
        Loss per group, shape (...).

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: a group of fewer than 2, or as for `policy_gradient`.

    Source: [kool2019], [ahmadian2024]; book chapter 3, `policy-gradient-tilt`.
    """
    _rewarded(logps, ref_logps, rewards, beta)
    _group("logps", logps, -1)
    returns = rewards - beta * (logps - ref_logps)
    return -(logps * _leave_one_out(returns).detach()).mean(-1)


def _group(name: str, value: Tensor, dim: int) -> None:
    if value.ndim < -dim or value.shape[dim] < 2:
        raise ValueError(f"{name} must hold groups of at least 2 draws, got shape {tuple(value.shape)}")


def _leave_one_out(values: Tensor) -> Tensor:
    """Subtract from each entry the mean of the others in its row: G / (G - 1) times the deviation from the mean."""
    g = values.shape[-1]
    return (values - values.mean(-1, keepdim=True)) * (g / (g - 1))


def grpo(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float,
    *,
    kl: Literal["reward", "k1", "k2", "k3"] = "k3",
    baseline: Literal["group", "leave-one-out"] = "group",
    scale: Literal["group", "none"] = "group",
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: float = 0.2,
) -> Tensor:
    """Compute the group relative policy optimisation loss, with the choices that public trainers offer.

        loss = -(1/G) sum_i sum_t [min(rho_it A_i, clip(rho_it, 1 - c, 1 + c) A_i) - beta k(y_it)]
        A_i = sg[(r_i - mean) / sd],   rho_it = pi(y_it) / sg[pi_old(y_it)],   k from `kl_estimators`

    The last dimension runs over tokens, and the KL term is one per token, as in public trainers. Pass whole-sequence
    log-probabilities with a last dimension of 1 for the term on the sequence ratio. The defaults are those of the
    paper; their fixed point is not the tilt (book chapter 3, `grpo-fixed-points`).

    Args:
        logps: log pi of each token, shape (..., G, L), G >= 2.
        ref_logps: log p of each token, same shape.
        rewards: Reward of each sequence, shape (..., G), finite.
        beta: KL coefficient in reward units, > 0.
        kl: Where KL enters. "k1", "k2", "k3": that term in the loss, differentiated. "reward": -beta log(pi / p) of the
            sequence is added to its reward before baseline and scale.
        baseline: "group": the mean over the group, the own draw included. "leave-one-out": the mean of the others.
        scale: "group": divide by the standard deviation over the group (over G, not G - 1); where that is 0 up to
            rounding, A = 0. "none": do not.
        mask: True at tokens that count, boolean, shape (..., G, L); None counts all.
        old_logps: log-probabilities under the policy that drew, shape (..., G, L); None when drawn just now.
        clip: Range c of the clipped ratio, > 0; without effect when `old_logps` is None.

    Returns:
        Loss per group, shape (...).

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: values not finite, log-probabilities above 0, shapes that do not fit, a group of fewer than 2, a
            sequence with no token left by `mask`, `beta` or `clip` not finite and > 0, or an unknown option.

    Source: [shao2024]; book chapter 3, `grpo-fixed-points`, `grpo-binary-exact` and `token-level-kl`.
    """
    _draws(logps=logps, ref_logps=ref_logps)
    _group("logps", logps, -2)
    _checks.finite("rewards", rewards)
    if rewards.shape != logps.shape[:-1]:
        raise ValueError(f"rewards must have shape {tuple(logps.shape[:-1])}, got {tuple(rewards.shape)}")
    _checks.positive("beta", beta)
    _checks.positive("clip", clip)
    _checks.one_of("kl", kl, ("reward", "k1", "k2", "k3"))
    _checks.one_of("baseline", baseline, ("group", "leave-one-out"))
    _checks.one_of("scale", scale, ("group", "none"))
    if mask is not None:
        _checks.some_tokens(mask, logps.shape)
    old = logps.detach() if old_logps is None else old_logps.detach()
    _draws(logps=logps, old_logps=old)

    if mask is not None:
        # Before any exponential: padding may be as unlikely as it likes, and infinity times 0 is not 0.
        logps, ref_logps, old = (torch.where(mask, x, 0) for x in (logps, ref_logps, old))
    size = rewards.abs()
    if kl == "reward":
        rewards = rewards - beta * (logps - ref_logps).sum(-1)
        size = size + beta * (logps.abs() + ref_logps.abs()).sum(-1)
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = _leave_one_out(rewards) if baseline == "leave-one-out" else centred
    if scale == "group":
        sd = centred.square().mean(-1, keepdim=True).sqrt()
        # Equal rewards may differ by rounding; dividing that by itself would turn it into advantages of size 1.
        rounding = 16 * torch.finfo(sd.dtype).eps * size.amax(-1, keepdim=True)
        advantages = torch.where(sd > rounding, advantages / torch.where(sd > rounding, sd, 1), 0)
    advantages = advantages.detach().unsqueeze(-1)
    ratios = torch.exp(logps - old)
    gain = torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    penalty = 0.0 if kl == "reward" else beta * getattr(kl_estimators(logps, ref_logps), kl)
    per_token = gain - penalty
    return -(per_token if mask is None else torch.where(mask, per_token, 0)).sum(-1).mean(-1)


def bradley_terry(chosen: Tensor, rejected: Tensor, labels: Tensor | float = 1.0) -> Tensor:
    """Compute the negative log-likelihood of comparisons under the Bradley-Terry model.

        loss = -l log sigma(d) - (1 - l) log sigma(-d),    d = r(chosen) - r(rejected)

    Differentiable. Label 1 says that `chosen` won, 0 that `rejected` did; a label between is a probability.

    Args:
        chosen: Rewards of the first item of each pair, any shape, finite.
        rejected: Rewards of the second item, same shape.
        labels: Probability that the first item wins, in [0, 1]: a number or a tensor that broadcasts.

    Returns:
        Loss per pair, shape of `chosen`.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: rewards not finite, shapes that do not fit, or a label outside [0, 1].

    Source: [bradley1952]; book chapter 3, `bradley-terry`.
    """
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        _checks.finite(name, value)
    _checks.same_shape(chosen=chosen, rejected=rejected)
    return _comparison_loss(chosen - rejected, labels)


def _comparison_loss(margin: Tensor, labels: Tensor | float) -> Tensor:
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(float(labels), dtype=margin.dtype, device=margin.device)
    _checks.probabilities("labels", labels)
    _checks.fits("labels", labels, margin)
    log_win, log_loss = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    return -labels * log_win - (1 - labels) * log_loss


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    labels: Tensor | float = 1.0,
) -> Tensor:
    """Compute the direct preference optimisation loss: Bradley-Terry with the rewards that the policy implies.

        loss = -l log sigma(d) - (1 - l) log sigma(-d)
        d = beta log(pi(chosen) / p(chosen)) - beta log(pi(rejected) / p(rejected))

    Differentiable in the log-probabilities of the policy. With labels l = sigma(r(chosen) - r(rejected)) it is least at
    the tilt at temperature beta.

    Args:
        chosen_logps: log pi of the first item of each pair, any shape; for sequences the sum over tokens.
        rejected_logps: log pi of the second item, same shape.
        ref_chosen_logps: log p of the first item, same shape.
        ref_rejected_logps: log p of the second item, same shape.
        beta: Temperature of the tilt in reward units, > 0.
        labels: Probability that the first item wins, in [0, 1]: a number or a tensor that broadcasts.

    Returns:
        Loss per pair, shape of `chosen_logps`.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: log-probabilities not finite or above 0, shapes that do not fit, `beta` not finite and > 0, or a
            label outside [0, 1].

    Source: [rafailov2023]; book chapter 3, `dpo-optimum`.
    """
    _draws(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    _checks.positive("beta", beta)
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    return _comparison_loss(chosen - rejected, labels)


def count_wins(first: Tensor, second: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count who beat whom in a list of comparisons, for `fit_bradley_terry`.

        wins_ij = number of comparisons that i won against j

    Args:
        first: First item of each comparison, indices in 0..k-1, integer tensor, shape (n,).
        second: Second item, same shape.
        labels: 1 where the first item won, 0 where the second did, shape (n,), any dtype.
        k: Number of items, >= 2.

    Returns:
        Table of counts, float64, shape (k, k).

    Raises:
        TypeError: indices that are not integers, or `k` not an int.
        ValueError: indices outside 0..k-1, shapes that differ, `k` < 2, or a label other than 0 and 1.
    """
    _checks.count("k", k)
    if k < 2:
        raise ValueError(f"k must be an integer >= 2, got {k}")
    first, second = _checks.indices("first", first, k), _checks.indices("second", second, k)
    _checks.same_shape(first=first, second=second, labels=labels)
    other = labels[(labels != 0) & (labels != 1)]
    if len(other):
        raise ValueError(f"labels must be 0 or 1, got {other[0].item()}")
    winner, loser = torch.where(labels == 1, first, second), torch.where(labels == 1, second, first)
    cells = winner.flatten() * k + loser.flatten()
    return torch.bincount(cells, minlength=k * k).double().view(k, k)


def fit_bradley_terry(wins: Tensor) -> Tensor:
    """Fit Bradley-Terry rewards to a table of comparisons by maximum likelihood.

        maximise sum_ij wins_ij log sigma(r_i - r_j)    subject to sum_i r_i = 0

    By Newton's method with steps of bounded length; the objective is concave. The rewards are identified up to the
    constant fixed here iff the comparison graph is connected, and the maximiser exists iff the graph of "i beat j" is
    strongly connected. Not differentiable.

    Args:
        wins: How often i beat j, or the expected number, shape (K, K), finite, >= 0, K >= 2. The diagonal is ignored.

    Returns:
        Rewards with mean 0, float64, shape (K,).

    Raises:
        TypeError: `wins` is not a floating tensor.
        ValueError: `wins` not square or with negative or non-finite entries; a comparison graph that is not connected;
            or a group of items that never lost to the rest, whose rewards would be infinite.

    Source: [bradley1952], [ford1957]; book chapter 3, `bradley-terry`.
    """
    _checks.finite("wins", wins)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
        raise ValueError(f"wins must have shape (K, K) with K >= 2, got {tuple(wins.shape)}")
    if bool((wins < 0).any()):
        raise ValueError(f"wins must be >= 0, got {wins.min().item():g}")
    table = wins.detach().double().clone().fill_diagonal_(0)
    _identified(table)
    rewards = torch.zeros(len(table), dtype=torch.float64, device=table.device)
    # Along a path of victories the rewards may differ by the sum of its log-odds, and a step moves each by at most 2;
    # after that Newton's method doubles the correct digits.
    odds = torch.log1p(table.max() / table[table > 0].min()).item()
    for _ in range(100 + math.ceil(len(table) * odds)):
        win, lose = torch.sigmoid(rewards[:, None] - rewards), torch.sigmoid(rewards - rewards[:, None])
        surplus = table * lose
        gradient = surplus.sum(0) - surplus.sum(1)
        spread = (table + table.T) * win * lose
        # Adding the all-ones matrix fixes the free constant: the Laplacian alone has that kernel.
        hessian = torch.diag(spread.sum(1)) - spread + spread.mean()
        direction = torch.linalg.solve(hessian, -gradient)
        # A comparison's curvature changes by at most e^4 within this distance; a full step may overshoot into the flat.
        size = float(direction.abs().max())
        rewards = rewards + min(1.0, 2.0 / max(size, 2.0)) * direction
        rewards = rewards - rewards.mean()
        if size < 1e-12 * max(1.0, float(rewards.abs().max())):
            break
    return rewards


def _identified(table: Tensor) -> None:
    """Require that the comparisons determine every reward difference."""
    beat = (table > 0).cpu().numpy()
    parts, part = connected_components(beat | beat.T, directed=False)
    if parts > 1:
        raise ValueError(
            f"wins must connect all items, got {parts} groups that were never compared with each other: the reward is "
            f"identified only up to one constant per group; one group is {_some(part == 0)}"
        )
    parts, part = connected_components(beat, directed=True, connection="strong")
    if parts > 1:
        unbeaten = next(i for i in range(parts) if not beat[part != i][:, part == i].any())
        raise ValueError(
            f"wins must let every group of items lose to the rest at least once, got {_some(part == unbeaten)} "
            "unbeaten by the others: the maximum-likelihood reward is infinite"
        )


def _some(members: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> str:
    listed = np.flatnonzero(members).tolist()
    return f"items {listed}" if len(listed) <= 8 else f"items {listed[:8]} and {len(listed) - 8} more"


def self_certainty(
    conditionals: Tensor, *, direction: Literal["policy", "uniform"] = "policy", mask: Tensor | None = None
) -> Tensor:
    """Compute the self-certainty of sequences: how far the policy is from uniform, on average over their positions.

        direction "policy":    u = (1/L) sum_t KL(pi(. | y_<t) || Unif(V)) = log V - mean entropy
        direction "uniform":   u = (1/L) sum_t KL(Unif(V) || pi(. | y_<t))

    Differentiable. Multiply by the number of tokens for the sum, which is the form that the theory uses.

    Args:
        conditionals: Log-probabilities of the next symbol at each position, shape (..., L, V), normalised.
        direction: "policy" puts the policy first, as in the paper this book accompanies; "uniform" puts the uniform law
            first, as in public RLIF code.
        mask: True at positions that count, boolean, shape (..., L); None counts all.

    Returns:
        Self-certainty in nats, shape (...); +inf for direction "uniform" where a symbol has probability 0.

    Raises:
        TypeError: `conditionals` not floating, or `mask` not boolean.
        ValueError: `conditionals` not normalised, without a dimension for positions, a sequence with no position left
            by `mask`, or an unknown direction.

    Source: [jiao2025], [kang2025], [zhao2025]; book chapter 4, `self-certainty` and `self-certainty-direction`.
    """
    _checks.logps("conditionals", conditionals)
    _checks.one_of("direction", direction, ("policy", "uniform"))
    if conditionals.ndim < 2:
        raise ValueError(f"conditionals must have shape (..., L, V), got {tuple(conditionals.shape)}")
    if mask is not None:
        _checks.some_tokens(mask, conditionals.shape[:-1])
    log_v = math.log(conditionals.shape[-1])
    if direction == "policy":
        # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
        per_token = log_v + (conditionals.exp() * torch.where(conditionals > -torch.inf, conditionals, 0)).sum(-1)
    else:
        per_token = -log_v - conditionals.mean(-1)
    if mask is None:
        return per_token.mean(-1)
    return torch.where(mask, per_token, 0).sum(-1) / mask.sum(-1)


def weighted_likelihood(logps: Tensor, log_weights: Tensor, *, self_normalized: bool = True) -> Tensor:
    """Compute the weighted negative log-likelihood of a pool of samples.

        loss = -sum_i W_i log q(y_i),    W_i = w_i / sum_j w_j    or, not self-normalised,  W_i = w_i / N

    Differentiable in `logps`. With w = exp(r / beta) at draws of p and fresh pools, unnormalised weights have the tilt
    as population optimum at every N; self-normalised ones have the law of soft best-of-N.

    Args:
        logps: log q(y_i) of the model to be fitted, shape (..., N).
        log_weights: log w_i, same shape; -inf drops a sample.
        self_normalized: Divide by the sum of the weights of the pool, or by N.

    Returns:
        Loss per pool, shape (...).

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: log-probabilities not finite or above 0, weights with NaN or +inf, shapes that differ, or a pool
            whose weights are all 0.

    Source: [peters2007]; book chapter 6, `weighted-likelihood` and `resampled-training`.
    """
    _checks.log_values("logps", logps)
    _checks.rewards("log_weights", log_weights)
    _checks.same_shape(logps=logps, log_weights=log_weights)
    _checks.some_left("log_weights", log_weights.amax(-1))
    weights = torch.softmax(log_weights, -1) if self_normalized else log_weights.exp() / log_weights.shape[-1]
    return -(weights.detach() * logps).sum(-1)
