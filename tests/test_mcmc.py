"""Rewriting strings: the exact kernel leaves p^a invariant, the sampler follows the kernel, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import F64, law, random_law, vector

from tiltlib import autoregressive, categorical, markov, mcmc, verify

# Start (.3, .3, .4 end), after a (.5, .1, .4), after b (.2, .6, .2), the end forced at the third place.
ROWS = torch.stack([law(0.5, 0.1, 0.4), law(0.2, 0.6, 0.2), law(0.3, 0.3, 0.4)])
FORCED = torch.stack([ROWS, ROWS, law(0, 0, 1).expand(3, 3)])
WORDS = markov.MarkovChain(FORCED, "ab|").stopped(3)
FIXED = markov.MarkovChain(ROWS, "ab|")
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=3)))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def support(chain):
    keep = chain.logps(STRINGS) > -math.inf
    return STRINGS[keep], chain.logps(STRINGS[keep])


def sizes_of(strings, end):
    return mcmc.lengths(strings, 2) if end else torch.full((len(strings),), 3)


def kernel(chain, power, *, end, factor=True):
    """Transition probabilities between all strings: sum over cuts, proposal times acceptance, the rest stays."""
    strings, logps = support(chain)
    sizes = sizes_of(strings, end)
    counted = sizes if factor else torch.ones_like(sizes)
    k = len(strings)
    moves = torch.zeros(k, k, dtype=F64)
    for i, j in itertools.product(range(k), repeat=2):
        accept = mcmc.log_accept(logps[i], logps[j], power, counted[i], counted[j]).exp()
        for cut in range(int(sizes[i])):
            if torch.equal(strings[i, :cut], strings[j, :cut]):
                contexts = chain.contexts_before(strings[j : j + 1])[0]
                end_given_prefix = sum(chain.table(t)[contexts[t], strings[j, t]] for t in range(cut, 3))
                moves[i, j] += end_given_prefix.exp() / sizes[i] * accept
    stay = 1 - moves.sum(-1)
    return strings, sizes, logps, moves + torch.diag(stay)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("chain", "end"), [(WORDS, True), (FIXED, False)], ids=["words", "fixed"])
def test_the_kernel_is_reversible_for_the_power_law(chain, end, power):
    _, _, logps, moves = kernel(chain, power, end=end)
    target = torch.log_softmax(power * logps, -1).exp()
    flow = target[:, None] * moves
    close(flow, flow.T, 1e-15)
    close(moves.sum(-1), torch.ones_like(target))


def test_without_the_factor_long_strings_win():
    _, sizes, logps, moves = kernel(WORDS, 2.0, end=True, factor=False)
    right = torch.softmax(2 * logps, -1)
    wrong = torch.softmax(2 * logps + sizes.double().log(), -1)
    flow = wrong[:, None] * moves
    close(flow, flow.T, 1e-15)
    by_length = [torch.stack([q[sizes == m].sum() for m in (1, 2, 3)]) for q in (right, wrong)]
    close(by_length[0], vector(0.673968, 0.075821, 0.250211), 1e-6)
    close(by_length[1], vector(0.427579, 0.096205, 0.476216), 1e-6)


@pytest.mark.parametrize(("chain", "end"), [(WORDS, WORDS.end), (FIXED, None)], ids=["words", "fixed"])
def test_the_sampler_keeps_the_power_law(chain, end, rng):
    """Started at exact draws of p^a, many moves leave them draws of p^a; so does one move follow the kernel."""
    strings, _, logps, moves = kernel(chain, 2.0, end=end is not None)
    target = torch.log_softmax(2 * logps, -1)
    wrong = torch.log_softmax(2 * logps + sizes_of(strings, True).double().log(), -1) if end else logps
    n = verify.plan(target, wrong)
    number = {tuple(row): i for i, row in enumerate(strings.tolist())}

    def index(tokens):
        return torch.tensor([number[tuple(row)] for row in tokens.tolist()])

    for start, steps in ((target, 5), (logps, 1)):
        law_after = torch.log(start.exp() @ torch.linalg.matrix_power(moves, steps))
        n = max(n, 20_000)
        x = strings[categorical.sample(start, n, generator=rng)]
        out = mcmc.power_mh(chain, x, 2.0, steps, generator=rng, end=end)
        verdict = verify.match(index(out.tokens), law_after, claim="power-mh", versus=[wrong])
        assert verdict, verdict.line()
        assert out.acceptance.shape == (n,) and 0 < out.acceptance.mean() < 1
    assert verify.match(index(out.tokens), wrong, claim="power-mh!wrong").decision == "REJECT"


def test_power_one_accepts_every_string_of_one_length(rng):
    x = FIXED.sample(100, 3, generator=rng)
    assert (mcmc.power_mh(FIXED, x, 1.0, 3, generator=rng).acceptance == 1).all()


def test_the_power_law_is_a_tilt():
    """p^a is the tilt by log p at beta = 1 / (a - 1)."""
    strings, logps = support(FIXED)
    close(FIXED.tilt(ROWS, 1 / (3 - 1), 3).logps(strings), torch.log_softmax(3 * logps, -1))


def test_inputs_stay(rng):
    x = FIXED.sample(50, 3, generator=rng)
    before = x.clone()
    mcmc.power_mh(FIXED, x, 2.0, 2, generator=rng)
    assert torch.equal(x, before)


def test_lengths_count_the_end():
    tokens = torch.tensor([[2, 2, 2], [0, 2, 2], [0, 1, 2], [0, 1, 1]])
    assert mcmc.lengths(tokens, 2).tolist() == [1, 2, 3, 3]
    with pytest.raises(ValueError, match="tokens must hold only 2 after the first 2, got 1 strings with other symbols"):
        mcmc.lengths(torch.tensor([[2, 0, 2], [0, 2, 2]]), 2)


def test_acceptance_by_hand():
    # (p'/p)^(a-1) |x|/|x'| = (.1 / .4)^1 * 3 / 2 = .375, and above 1 in the other direction.
    got = mcmc.log_accept(
        vector(0.4, 0.1).log(), vector(0.1, 0.4).log(), 2.0, torch.tensor([3, 2]), torch.tensor([2, 3])
    )
    close(got.exp(), vector(0.375, 1.0))
    never = mcmc.log_accept(vector(0.0), vector(-math.inf), 0.5, torch.tensor([1]), torch.tensor([1]))
    assert never.item() == -math.inf


ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((vector(0), vector(0), 0.0, ONE, ONE), ValueError, "power must be finite and > 0, got 0.0"),
        ((vector(-math.inf), vector(0), 2.0, ONE, ONE), ValueError, "logps must be finite, got 1 of 1"),
        ((vector(0), vector(0), 2.0, ONE, 0 * ONE), ValueError, "sizes and new_sizes must be >= 1, got 0"),
        ((vector(0), vector(0, 0), 2.0, ONE, ONE), ValueError, "must have one shape"),
        # A model that breaks must not look like a chain that stands still, or one that always moves.
        (
            (vector(0), vector(math.nan), 2.0, ONE, ONE),
            ValueError,
            "new_logps must be finite or -inf, got 1 of 1 entries",
        ),
        (
            (vector(0), vector(math.inf), 2.0, ONE, ONE),
            ValueError,
            "new_logps must be finite or -inf, got 1 of 1 entries",
        ),
        ((vector(math.nan), vector(0), 2.0, ONE, ONE), ValueError, "logps must be finite, got 1 of 1"),
        ((vector(math.inf), vector(0), 2.0, ONE, ONE), ValueError, "logps must be finite, got 1 of 1"),
        ((vector(0), [0.0], 2.0, ONE, ONE), TypeError, "new_logps must be a floating-point torch.Tensor, got list"),
        (
            (vector(0), ONE, 2.0, ONE, ONE),
            TypeError,
            "new_logps must be a floating-point torch.Tensor, got a torch.int64",
        ),
        ((vector(0), vector(0), 2.0, [1], ONE), TypeError, "sizes must be an integer torch.Tensor, got list"),
        (
            (vector(0), vector(0), 2.0, ONE, np.ones(1)),
            TypeError,
            "new_sizes must be an integer torch.Tensor, got ndarray",
        ),
        (
            (vector(0), vector(0), 2.0, ONE, ONE.double()),
            TypeError,
            "new_sizes must be an integer .*got a torch.float64",
        ),
        ((vector(0), vector(0), torch.tensor(2.0), ONE, ONE), TypeError, "power must be a number, got a torch.float32"),
    ],
)
def test_bad_acceptance(arguments, error, text):
    with pytest.raises(error, match=text):
        mcmc.log_accept(*arguments)


GOOD = torch.tensor([[0, 0, 2], [2, 2, 2]])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"power": math.inf}, ValueError, "power must be finite and > 0, got inf"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"tokens": GOOD.double()}, TypeError, "tokens must be an integer torch.Tensor"),
        ({"tokens": GOOD[0]}, ValueError, r"tokens must have shape \(n, L\), got \(3,\)"),
        ({"tokens": torch.tensor([[2, 0, 2]])}, ValueError, "tokens must have positive probability, got 1 strings"),
        ({"end": "|"}, TypeError, "end must be an int, got str"),
        ({"end": 3}, ValueError, r"end must lie in 0\.\.2, got 3"),
        ({"end": -1}, ValueError, r"end must lie in 0\.\.2, got -1"),
        ({"tokens": [[0, 0, 2]]}, TypeError, "tokens must be an integer torch.Tensor, got list"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
        ({"model": FIXED, "steps": 50}, ValueError, "tokens must hold only 2 after the first 2"),
    ],
)
def test_bad_input(change, error, text, rng):
    arguments = {"model": WORDS, "tokens": GOOD, "power": 2.0, "steps": 1, "end": 2, "generator": rng, **change}
    with pytest.raises(error, match=text.replace("|", r"\|")):
        mcmc.power_mh(**arguments)


def test_a_stopped_chain_writes_one_word(rng):
    chain = markov.MarkovChain(torch.stack([random_law(3, rng) for _ in range(9)]), "ab|").stopped(6)
    x = chain.sample(500, 6, generator=rng)
    assert (mcmc.lengths(x, 2) >= 1).all() and (x[:, 0] == 2).any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_acceptance_in_every_dtype(dtype):
    """(p'/p)^(a-1) |x| / |x'|, rounded once; sizes and powers beyond the range of half precision."""
    logps, new = vector(-3, -40, -2, -60000, -1).to(dtype), vector(-2.5, -math.inf, -70, -60000, -1).to(dtype)
    sizes, new_sizes = torch.tensor([70000, 1, 3, 100000, 1]), torch.tensor([140000, 1, 2, 200000, 3])
    for power in (1e-300, 0.5, 1.0, 2.0, 1e300):
        got = mcmc.log_accept(logps, new, power, sizes, new_sizes)
        difference = new.double() - logps.double()
        exact = (power - 1) * difference.clamp(min=-1e300) + (sizes.double() / new_sizes.double()).log()
        exact[1] = math.inf * -1
        assert got.dtype == dtype
        close(got.double(), exact.clamp(max=0).to(dtype).double(), 1e-14 if dtype == F64 else 0)
    assert mcmc.log_accept(logps.float(), new.double(), 2.0, sizes, new_sizes).dtype == F64


def test_the_gradient_of_the_acceptance_is_finite():
    new = vector(-1, -math.inf, -5).requires_grad_()
    for power, slope in ((1.0, 0.0), (3.0, 2.0)):
        accept = mcmc.log_accept(vector(-0.5, -1, -1), new, power, ONE.expand(3), ONE.expand(3))
        (gradient,) = torch.autograd.grad(accept[accept > -math.inf].sum(), new)
        close(gradient, vector(slope, 0, slope))


def test_no_strings_are_a_batch(rng):
    none, empty = torch.zeros(0, 3).long(), torch.zeros(0).long()
    for dtype in (F64, torch.float16):
        accept = mcmc.log_accept(empty.to(dtype), empty.to(dtype), 2.0, empty, empty)
        assert accept.shape == (0,) and accept.dtype == dtype
    assert mcmc.lengths(none, 2).shape == (0,) and mcmc.lengths(none, 2).dtype == torch.int64
    for chain, end in ((WORDS, WORDS.end), (FIXED, None)):
        out = mcmc.power_mh(chain, none, 2.0, 2, generator=rng, end=end)
        assert out.tokens.shape == (0, 3) and out.acceptance.shape == (0,) and out.acceptance.dtype == F64
    with pytest.raises(ValueError, match=r"tokens must hold at least one number, got shape \(2, 0\)"):
        mcmc.lengths(torch.zeros(2, 0).long(), 2)


def test_bad_lengths():
    assert mcmc.lengths(torch.tensor([0, 2]), np.int64(2)).item() == 2
    with pytest.raises(TypeError, match="end must be an int, got float"):
        mcmc.lengths(torch.tensor([0, 2]), 2.0)
    with pytest.raises(TypeError, match="end must be an int, got NoneType"):
        mcmc.lengths(torch.tensor([0, 2]), None)
    with pytest.raises(ValueError, match="tokens must have a last dimension"):
        mcmc.lengths(torch.tensor(2), 2)


def test_a_float32_chain_moves_as_its_float64_law(rng):
    small = markov.MarkovChain(ROWS.float(), "ab|")
    meant = markov.MarkovChain(torch.log_softmax(ROWS.float().double(), -1), "ab|")
    x, state = small.sample(500, 3, generator=rng), rng.get_state()
    out = mcmc.power_mh(small, x, np.float64(2.0), np.int64(4), generator=rng)
    rng.set_state(state)
    expected = mcmc.power_mh(meant, x, 2.0, 4, generator=rng)
    assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.acceptance, expected.acceptance)


# --- ends drawn from another law ------------------------------------------------------------------------------------

END = WORDS.end
OTHER = torch.stack([law(0.2, 0.5, 0.3), law(0.4, 0.4, 0.2), law(0.6, 0.1, 0.3)])
OTHER_WORDS = markov.MarkovChain(torch.stack([OTHER, OTHER, law(0, 0, 1).expand(3, 3)]), "ab|").stopped(3)
# No b after a and no a after b: the proposal writes what this chain cannot.
SPARSE = markov.MarkovChain(torch.stack([law(0.6, 0, 0.4), law(0, 0.8, 0.2), law(0.3, 0.3, 0.4)]), "ab|").stopped(3)
PAIRS = {
    "words": (WORDS, OTHER_WORDS, True),
    "fixed": (FIXED, markov.MarkovChain(OTHER, "ab|"), False),
    "sparse": (SPARSE, markov.MarkovChain(OTHER, "ab|").stopped(3), True),
    "itself": (WORDS, WORDS, True),
}


def ends_from(chain, proposal, power, *, end, corrected=True):
    """As `kernel`, with ends from the proposal; uncorrected, the acceptance takes them for ends of p."""
    strings, logps = support(chain)
    sizes = sizes_of(strings, end)
    moves = torch.zeros(len(strings), len(strings), dtype=F64)
    for i, j in itertools.product(range(len(strings)), repeat=2):
        tables = [proposal.table(t) for t in range(3)]
        for cut in range(int(sizes[i])):
            if not torch.equal(strings[i, :cut], strings[j, :cut]):
                continue
            old_end, new_end = (
                sum(tables[t][x[t - 1] if t else 2, x[t]] for t in range(cut, 3)) for x in (strings[i], strings[j])
            )
            between = {"proposal_logps": old_end, "new_proposal_logps": new_end} if corrected else {}
            accept = mcmc.log_accept(logps[i], logps[j], power, sizes[i], sizes[j], **between)
            moves[i, j] += (new_end + accept).exp() / sizes[i]
            whole = [proposal.logps(strings[x : x + 1])[0] for x in (i, j)]
            if corrected:
                of_whole = mcmc.log_accept(
                    logps[i], logps[j], power, sizes[i], sizes[j], proposal_logps=whole[0], new_proposal_logps=whole[1]
                )
                close(of_whole, accept, 1e-14)
    return strings, logps, moves + torch.diag(1 - moves.sum(-1))


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.slow
def test_ends_from_another_law_leave_the_power_law_in_balance(pair, power):
    chain, proposal, end = PAIRS[pair]
    _, logps, moves = ends_from(chain, proposal, power, end=end)
    target = torch.softmax(power * logps, -1)
    flow = target[:, None] * moves
    close(flow, flow.T, 1e-15)
    assert bool((moves >= -1e-15).all())
    assert bool((torch.linalg.matrix_power(moves, 3) > 0).all())  # and every string is reached
    if pair != "itself":
        _, _, moves = ends_from(chain, proposal, power, end=end, corrected=False)
        assert (target @ moves - target).abs().sum() > 0.01


@pytest.mark.parametrize("pair", ["words", "fixed", "sparse"])
@pytest.mark.slow
def test_the_sampler_follows_the_kernel_of_another_law(pair, rng):
    chain, proposal, end = PAIRS[pair]
    strings, logps, moves = ends_from(chain, proposal, 2.0, end=end)
    uncorrected = ends_from(chain, proposal, 2.0, end=end, corrected=False)[2]
    target = torch.log_softmax(2 * logps, -1)
    number = {tuple(row): i for i, row in enumerate(strings.tolist())}
    for start, steps in ((target, 4), (logps, 1)):
        right, wrong = (torch.log(start.exp() @ torch.linalg.matrix_power(m, steps)) for m in (moves, uncorrected))
        n = verify.plan(right, wrong)
        x = strings[categorical.sample(start, n, generator=rng)]
        out = mcmc.power_mh(chain, x, 2.0, steps, generator=rng, end=END if end else None, proposal=proposal)
        index = torch.tensor([number[tuple(row)] for row in out.tokens.tolist()])
        verdict = verify.match(index, right, claim="power-mh", versus=[wrong])
        assert verdict, verdict.line()
        assert verify.match(index, wrong, claim="power-mh!uncorrected").decision == "REJECT"


def test_the_reference_may_be_named_as_its_own_proposal(rng):
    x, state = WORDS.sample(200, 3, generator=rng), rng.get_state()
    out = mcmc.power_mh(WORDS, x, 3.0, 4, generator=rng, end=END)
    rng.set_state(state)
    same = mcmc.power_mh(WORDS, x, 3.0, 4, generator=rng, end=END, proposal=WORDS)
    assert torch.equal(out.tokens, same.tokens) and torch.equal(out.acceptance, same.acceptance)


def test_power_one_with_the_target_as_proposal_always_moves(rng):
    """From draws of the tilt p^3 with the tilt itself as proposal every move is accepted."""
    tilted = FIXED.tilt(ROWS, 1 / (3 - 1), 3)
    x = tilted.sample(200, 3, generator=rng)
    assert (mcmc.power_mh(FIXED, x, 3.0, 3, generator=rng, proposal=tilted).acceptance > 1 - 1e-12).all()
    assert mcmc.power_mh(FIXED, x, 3.0, 3, generator=rng).acceptance.mean() < 0.9


def test_acceptance_of_another_law_by_hand():
    # (p'/p)^2 (q/q') |x|/|x'| = (.1/.2)^2 (.6/.3) (3/2) = .75; then q = 0, p' = 0, and a ratio above 1.
    p, new_p = vector(0.2, 0.2, 0.2, 0.1).log(), vector(0.1, 0.1, 0.0, 0.2).log()
    q, new_q = vector(0.6, 0.0, 0.6, 0.3).log(), vector(0.3, 0.3, 0.3, 0.6).log()
    sizes, new_sizes = torch.tensor([3, 3, 3, 2]), torch.tensor([2, 2, 2, 3])
    got = mcmc.log_accept(p, new_p, 2.0, sizes, new_sizes, proposal_logps=q, new_proposal_logps=new_q)
    close(got.exp(), vector(0.75, 0, 0, 1))
    for dtypes in itertools.product((torch.float16, torch.float32, F64), repeat=3):
        mixed = [x.to(d) for x, d in zip((p, q, new_q), dtypes, strict=True)]
        got = mcmc.log_accept(
            mixed[0], new_p.half(), 2.0, sizes, new_sizes, proposal_logps=mixed[1], new_proposal_logps=mixed[2]
        )
        assert got.dtype == max(dtypes, key=lambda d: torch.finfo(d).bits)
        close(got.double().exp(), vector(0.75, 0, 0, 1), 4e-3)


def test_the_gradient_with_another_law_is_finite():
    values = [vector(-1, -1, -1), vector(-2, -math.inf, -2), vector(-1, -1, -math.inf), vector(-0.5, -0.5, -0.5)]
    p, new_p, q, new_q = (x.requires_grad_() for x in values)
    size = torch.ones(3).long()
    accept = mcmc.log_accept(p, new_p, 3.0, size, size, proposal_logps=q, new_proposal_logps=new_q)
    found = torch.autograd.grad(accept[0], (p, new_p, q, new_q))
    close(torch.stack(found), vector(-3, 3, 1, -1)[:, None] * vector(1, 0, 0))


@pytest.mark.parametrize(
    ("between", "error", "text"),
    [
        ({"proposal_logps": vector(0)}, TypeError, "^new_proposal_logps must be .*, got NoneType"),
        ({"new_proposal_logps": vector(0)}, TypeError, "^proposal_logps must be .*, got NoneType"),
        ({"proposal_logps": vector(math.nan), "new_proposal_logps": vector(0)}, ValueError, "^proposal_logps must be"),
        ({"proposal_logps": vector(math.inf), "new_proposal_logps": vector(0)}, ValueError, "^proposal_logps must be"),
        ({"proposal_logps": ONE, "new_proposal_logps": vector(0)}, TypeError, "^proposal_logps must be a floating"),
        ({"proposal_logps": vector(0), "new_proposal_logps": ONE}, TypeError, "^new_proposal_logps must be a floating"),
        ({"proposal_logps": vector(0, 0), "new_proposal_logps": vector(0)}, ValueError, "must have one shape"),
        ({"proposal_logps": vector(0), "new_proposal_logps": vector(0, 0)}, ValueError, "must have one shape"),
        *(
            ({"proposal_logps": vector(0), "new_proposal_logps": vector(x)}, ValueError, "^new_proposal_logps must be")
            for x in (math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_bad_acceptance_with_another_law(between, error, text):
    with pytest.raises(error, match=text):
        mcmc.log_accept(vector(0), vector(0), 2.0, ONE, ONE, **between)


@pytest.mark.parametrize(
    ("proposal", "error", "text"),
    [
        (OTHER, TypeError, "proposal must be an AutoregressiveModel, got a torch.float64 tensor"),
        (markov.MarkovChain(OTHER, "xy|"), ValueError, "proposal must have order 1 over 'ab|'"),
        (markov.MarkovChain(OTHER.repeat(3, 1), "ab|"), ValueError, "proposal must have order 1 over .*got order 2"),
        (OTHER_WORDS.stopped(2), ValueError, "proposal must have tables for 3 steps, got 2"),
        (SPARSE, ValueError, "proposal must be positive wherever model is, got a string that only model can write"),
        (markov.MarkovChain(OTHER, "ab|"), ValueError, "tokens must hold only 2 after the first 2"),
    ],
)
def test_bad_proposals(proposal, error, text, rng):
    with pytest.raises(error, match=text.replace("|", r"\|")):
        mcmc.power_mh(WORDS, GOOD, 2.0, 50, generator=rng, end=END, proposal=proposal)


def test_no_strings_with_another_law(rng):
    out = mcmc.power_mh(WORDS, torch.zeros(0, 3).long(), 2.0, 2, generator=rng, end=END, proposal=OTHER_WORDS)
    assert out.tokens.shape == (0, 3) and out.acceptance.shape == (0,)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_string_that_p_excludes_is_not_accepted_even_by_the_uniform_number_0(monkeypatch):
    never_a = markov.MarkovChain(law(0, 0.5, 0.5).expand(3, 3), "ab|")
    often_a = markov.MarkovChain(law(0.5, 0.25, 0.25).expand(3, 3), "ab|")
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kwargs: torch.zeros(size[0] if len(size) == 1 else size, dtype=F64)
    )
    start = torch.tensor([[1, 2, 1]])
    out = mcmc.power_mh(never_a, start, 2.0, 3, generator=torch.Generator(), proposal=often_a)
    assert torch.equal(out.tokens, start) and out.acceptance.item() == 0
    assert mcmc.power_mh(often_a, start, 2.0, 3, generator=torch.Generator()).tokens.tolist() == [[0, 0, 0]]


def test_every_broken_string_is_counted():
    with pytest.raises(ValueError, match="got 2 strings with other symbols"):
        mcmc.lengths(torch.tensor([[2, 0, 2], [0, 2, 2], [2, 2, 1]]), 2)


def test_no_argument_may_have_a_shape_of_its_own():
    p, size = ("logps", "new_logps"), ("sizes", "new_sizes")
    q = ("proposal_logps", "new_proposal_logps")
    cases = [((*p, *size), (name,)) for name in (*p, *size)] + [((*p, *size, *q), other) for other in (q, q[:1], q[1:])]
    for names, other in cases:
        values = {name: ONE if name in size else vector(0) for name in names}
        values |= {name: torch.cat([values[name], values[name]]) for name in other}
        with pytest.raises(ValueError, match=r"must have one shape, got .*\(2,\)"):
            mcmc.log_accept(power=2.0, **values)


def test_a_proposal_over_other_tokens_is_refused(rng):
    four = markov.MarkovChain(law(0.25, 0.25, 0.25, 0.25).expand(4, 4), "abc|")
    with pytest.raises(ValueError, match="^proposal must be over the 3 tokens of model, got 4$"):
        mcmc.power_mh(FIXED, STRINGS, 2.0, 1, generator=rng, proposal=four)


def test_of_a_model_without_tables_the_proposal_is_taken_on_trust(rng):
    """One that cannot write b: strings with b are never left, and no others get it."""
    only_a = markov.MarkovChain(law(0.6, 0, 0.4).expand(3, 3), "ab|")
    open_model = autoregressive.Stopped(FIXED, 2)  # no chain, so nothing is proved
    strings = torch.tensor([[0, 0, 2], [0, 1, 2], [2, 2, 2], [1, 1, 2]])
    has_b = (strings == 1).any(-1)
    for model, proposal in ((open_model, only_a.stopped(3)), (WORDS, autoregressive.Stopped(only_a, 2))):
        out = mcmc.power_mh(model, strings, 2.0, 20, generator=rng, end=2, proposal=proposal)
        assert torch.equal((out.tokens == 1).any(-1), has_b)
        assert torch.equal(out.tokens[has_b], strings[has_b])


def test_a_single_string_is_written_with_its_own_context(rng):
    """Fewer strings than places: after a comes b, after b comes a."""
    cycle = markov.MarkovChain(torch.stack([law(0, 1, 0), law(1, 0, 0), law(1, 0, 0)]), "ab|")
    out = mcmc.power_mh(cycle, torch.tensor([[0, 1, 0, 1]]), 2.0, 20, generator=rng)
    assert out.tokens.tolist() == [[0, 1, 0, 1]] and out.acceptance.item() == 1


# --- the exact law after some moves ---


def dense_moves(p, v, length, power):
    """The matrix of one move, string by string, from the rule alone."""
    k = v**length
    moves = torch.zeros(k, k, dtype=F64)
    for x in range(k):
        if p[x] == -math.inf:
            moves[x, x] = 1
            continue
        for cut in range(length):
            size = v ** (length - cut)
            first = x // size * size
            end = (p[first : first + size] - p[first : first + size].logsumexp(0)).exp()
            for i, q in enumerate(end.tolist()):
                y = first + i
                if q:
                    accepted = min(1.0, math.exp((power - 1) * (p[y] - p[x]).item()))
                    moves[x, y] += q * accepted / length
                    moves[x, x] += q * (1 - accepted) / length
    return moves


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("v", "length"), [(1, 3), (2, 1), (5, 1), (3, 3), (2, 4)])
def test_the_law_after_moves_is_that_of_the_matrix(v, length, power, rng):
    for zeros in (False, True):
        logits = 3 * torch.randn(v**length, generator=rng, dtype=F64)
        logits = torch.where(torch.rand(len(logits), generator=rng) < 0.3, logits.round(), logits)  # some ties
        if zeros and v > 1:
            logits[torch.rand(len(logits), generator=rng) < 0.3] = -math.inf
            logits[: v ** (length - 1)] = -math.inf  # nothing begins with the first token
            logits[-1] = 0.0
        p = logits.log_softmax(-1)
        moves = dense_moves(p, v, length, power)
        start = torch.where(p > -math.inf, torch.randn(len(p), generator=rng, dtype=F64), -math.inf).log_softmax(-1)
        for steps in (0, 1, 2, 7):
            expected = (p.exp() @ torch.linalg.matrix_power(moves, steps)).clamp(min=0)
            torch.testing.assert_close(
                mcmc.power_mh_law(p, length, power, steps).exp(), expected, rtol=1e-12, atol=1e-15
            )
            found = mcmc.power_mh_law(p, length, power, steps, start=start).exp()
            expected = start.exp() @ torch.linalg.matrix_power(moves, steps)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        target = torch.where(p > -math.inf, power * p, -math.inf).log_softmax(-1)
        stays = mcmc.power_mh_law(p, length, power, 5, start=target)
        torch.testing.assert_close(stays.exp(), target.exp(), rtol=1e-12, atol=1e-15)


def test_the_law_after_moves_is_that_of_power_mh(rng):
    chain = markov.MarkovChain(torch.randn(3, 3, 3, generator=rng, dtype=F64).log_softmax(-1), "ab ")
    strings = torch.tensor(list(itertools.product(range(3), repeat=3)))
    law, other = (mcmc.power_mh_law(chain.logps(strings), 3, 3.0, steps) for steps in (2, 3))
    n = verify.plan(law, other)
    moved = mcmc.power_mh(chain, chain.sample(n, 3, generator=rng), 3.0, 2, generator=rng).tokens
    samples = (moved * torch.tensor([9, 3, 1])).sum(-1)
    assert verify.match(samples, law, claim="law", versus=[other]).decision == "PASS"
    assert verify.match(samples, other, claim="law", versus=[law]).decision == "REJECT"


def test_the_law_after_moves_at_extreme_weights():
    p = torch.tensor([0.0, -1e5, -3e5, -1e6], dtype=F64).log_softmax(-1)
    moved = mcmc.power_mh_law(p, 2, 4.0, 3, start=torch.tensor([-math.inf, -math.inf, -math.inf, 0.0], dtype=F64))
    # From the last string each cut leads to the likeliest string that shares its beginning.
    # Half of the cuts redraw all, to string 0; half the last token, to string 2, from which the others go on.
    stays = torch.tensor([1 - 0.5**3, 0.0, 0.5**3, 0.0], dtype=F64)
    torch.testing.assert_close(moved.exp(), stays, rtol=0, atol=1e-15)


def test_bad_arguments_of_the_law_after_moves_are_refused():
    p = torch.full((9,), -math.log(9), dtype=F64)
    with pytest.raises(ValueError, match=r"logps must have shape \(V\^L,\) with L = 3, got \(9,\)"):
        mcmc.power_mh_law(p, 3, 2.0, 1)
    with pytest.raises(ValueError, match=r"logps must have shape \(V\^L,\) with L = 1, got \(3, 3\)"):
        mcmc.power_mh_law(p.view(3, 3) + math.log(3), 1, 2.0, 1)
    with pytest.raises(ValueError, match="steps must be an integer >= 0, got -1"):
        mcmc.power_mh_law(p, 2, 2.0, -1)
    with pytest.raises(TypeError, match="steps must be an int, got"):
        mcmc.power_mh_law(p, 2, 2.0, 1.0)
    with pytest.raises(TypeError, match="steps must be an int, got"):
        mcmc.power_mh_law(p, 2, 2.0, True)
    with pytest.raises(ValueError, match="length must be an integer >= 1, got 0"):
        mcmc.power_mh_law(p, 0, 2.0, 1)
    with pytest.raises(ValueError, match="power must be"):
        mcmc.power_mh_law(p, 2, 0.0, 1)
    with pytest.raises(ValueError, match=r"start must have the shape of logps, \(9,\), got \(1,\)"):
        mcmc.power_mh_law(p, 2, 2.0, 1, start=torch.zeros(1, dtype=F64))
    q = torch.tensor([-math.inf, 0.0], dtype=F64)
    with pytest.raises(ValueError, match="start must be -inf where logps is"):
        mcmc.power_mh_law(q, 1, 2.0, 1, start=torch.tensor([0.0, -math.inf], dtype=F64))
