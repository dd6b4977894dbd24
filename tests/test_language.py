import copy
import json
import math
import types

import pytest
import torch
from helpers import F64

from tiltlib import categorical, language, mcmc, selection, smc, stepwise, verify
from tiltlib.autoregressive import AutoregressiveModel, Stopped
from tiltlib.language import LanguageModel
from tiltlib.testing import check_model
from tiltlib.verify import rng

transformers = pytest.importorskip("transformers")

V, L = 9, 4
PROMPT = torch.tensor([1, 5, 2])
SMALL = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def networks():
    """One tiny random network of each kind, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).double().eval(),
            "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)).double().eval(),
            "gpt2": transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=V,
                    n_embd=16,
                    n_layer=2,
                    n_head=4,
                    n_positions=64,
                    initializer_range=0.5,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
            .double()
            .eval(),
        }


NETWORKS = networks()
KINDS = list(NETWORKS)
# The norms of two of these round to float32, even in a network of float64.
DIGITS = {"llama": 1e-6, "qwen2": 1e-6, "gpt2": 1e-12}
OPTIONS = [{}, {"end": 3}, {"end": 3, "top_k": 4}, {"top_k": 4}, {"temperature": 0.7, "top_k": 5}]


def model(kind="llama", length=L, **options):
    return LanguageModel(NETWORKS[kind], PROMPT, length, **options)


def by_hand(kind, tokens, *, end=None, top_k=None, temperature=1.0):
    """Log-probability of each string from full passes of the network, without a cache, prefix by prefix."""
    total = []
    for string in tokens.tolist():
        logp, ended = 0.0, False
        for t, token in enumerate(string):
            if ended:
                logp += 0.0 if token == end else -math.inf
                continue
            read = torch.tensor([[*PROMPT.tolist(), *string[:t]]])
            logits = NETWORKS[kind](input_ids=read, use_cache=False).logits[0, -1].detach() / temperature
            kept = sorted(range(V), key=lambda a, x=logits: (-x[a].item(), a))[: top_k or V]
            logp += (logits[token] - logits[kept].logsumexp(0)).item() if token in kept else -math.inf
            ended = token == end
        total.append(logp)
    return torch.tensor(total, dtype=F64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_strings_have_the_law_of_the_network(kind, options):
    some = torch.randint(V, (40, L), generator=rng("language", "strings"))
    some[:, 1:3] = torch.where(torch.arange(40)[:, None] % 3 == 0, 3, some[:, 1:3])  # many that end early
    expected = by_hand(kind, some, **options)
    assert options.get("top_k") is None or bool((expected == -math.inf).any())
    torch.testing.assert_close(model(kind, **options).logps(some), expected, rtol=0, atol=DIGITS[kind])
    rows = AutoregressiveModel.logps(model(kind, **options), some)  # token by token, with the cache
    torch.testing.assert_close(rows, expected, rtol=0, atol=DIGITS[kind])
    terms = model(kind, **options).token_logps(some)
    for t in range(1, L):
        begun = model(kind, **options).token_logps(some[:, :t])
        torch.testing.assert_close(begun, terms[:, :t], rtol=0, atol=DIGITS[kind])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_rules_of_a_model(kind, options):
    check_model(model(kind, **options), L, generator=rng("language", "rules"), draws=4000)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_holds_every_string(kind, options):
    L = 3  # noqa: N806
    m = model(kind, L, **options, chunk=11)  # one or two parents at a time, and a last part that is smaller
    tree = m.tree()
    k = options.get("top_k", V)
    assert tree.tokens.shape == (k**L, L) and tree.logps.shape == (k**L,)
    possible = tree.logps > -math.inf
    assert tree.logps.exp().sum() == pytest.approx(1, abs=1e-14)
    strings = tree.tokens[possible]
    assert len(strings.unique(dim=0)) == len(strings)
    torch.testing.assert_close(m.logps(strings), tree.logps[possible], rtol=0, atol=DIGITS[kind])
    number = torch.arange(k**L)
    assert torch.equal(tree.find(strings), number[possible])
    assert torch.equal(tree.number(tree.ranks(number)), number)
    torch.testing.assert_close(tree.chain.logps(tree.ranks(number))[possible], tree.logps[possible], rtol=0, atol=1e-12)
    ranks = tree.ranks(number[possible])
    for t in range(L):  # ranks go by token number
        ids = tree.ids[t][ranks[:, :t] @ k ** torch.arange(t - 1, -1, -1)]
        assert torch.equal(ids.gather(1, ranks[:, t : t + 1])[:, 0], strings[:, t])
        # after its end a string has one column that counts
        ended = (strings[:, :t] == options.get("end", -1)).any(-1)
        assert bool((ids[~ended].diff(dim=-1) > 0).all())
    impossible = strings[[1, 0, 2]]
    impossible[1, -1] = V - 1
    if k < V and not bool((tree.tokens == impossible[1]).all(-1).any()):
        with pytest.raises(ValueError, match=r"tokens must be strings of the tree, got token 8 at place 2 of row 1"):
            tree.find(impossible)
    table = number.view(k, k, -1)  # numbers of any shape
    assert torch.equal(tree.ranks(table), tree.ranks(number).view(k, k, -1, L))
    assert torch.equal(tree.number(tree.ranks(table)), table) and tree.number(tree.ranks(number[k])) == k


def test_a_tree_of_one_token():
    tree = model(length=1, top_k=3).tree()
    assert tree.chain.order == 1 and tree.tokens.shape == (3, 1)
    ranks = tree.ranks(torch.arange(3))
    assert torch.equal(tree.number(ranks), torch.arange(3)) and torch.equal(tree.find(tree.tokens), torch.arange(3))
    torch.testing.assert_close(tree.chain.logps(ranks), tree.logps, rtol=0, atol=1e-14)
    r = torch.tensor([0.0, 2.0, -1.0], dtype=F64)
    tilted = tree.chain.tilt(tree.rewards(r), 0.5, 1)
    torch.testing.assert_close(tilted.logps(ranks), categorical.tilt(tree.logps, r, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_reward_of_strings_tilts_the_chain(length):
    tree = model(length=length, top_k=3, end=3).tree()
    r = torch.randn(3**length, generator=rng("language", "rewards"), dtype=F64)
    number = torch.arange(3**length)
    tilted = tree.chain.tilt(tree.rewards(r), 0.7, length)
    possible = tree.logps > -math.inf
    expected = categorical.tilt(tree.logps, r, 0.7)[possible]
    torch.testing.assert_close(tilted.logps(tree.ranks(number))[possible], expected, rtol=0, atol=1e-12)
    x = r.clone().requires_grad_()
    (tree.rewards(x)[-1].sum() + tree.rewards(x).sum()).backward()
    assert x.grad is not None and bool((x.grad == 1).all())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_do_not_depend_on_chunks_nor_on_the_way_they_are_made(options):
    whole = model(**options).sample(50, generator=rng("language", "draws"))
    parts = model(**options, chunk=3).sample(50, generator=rng("language", "draws"))
    # Token by token over the whole vocabulary, as any model draws that has no method of its own.
    plain = AutoregressiveModel.sample(model(**options), 50, L, generator=rng("language", "draws"))
    assert torch.equal(whole, parts) and torch.equal(whole, plain)
    for draw in (AutoregressiveModel.draw, LanguageModel.draw):
        m, g, stepwise = model(**options), rng("language", "draws"), torch.zeros(50, 0, dtype=torch.int64)
        state = m.begin(50)
        for t in range(L):
            token = draw(m, state, generator=g)
            stepwise = torch.cat([stepwise, token[:, None]], 1)
            state = m.append(state, token) if t + 1 < L else state
        assert torch.equal(whole, stepwise)
    for length in (1, 2):
        some = model(**options).sample(50, length, generator=rng("language", "draws"))
        assert torch.equal(some, whole[:, :length])


def test_draws_follow_the_law_and_not_that_of_another_temperature():
    m = model(length=3, top_k=4)
    tree, wrong = m.tree(), model(length=3, top_k=4, temperature=1.05).tree().logps
    n = verify.plan(tree.logps, wrong)
    samples = tree.find(m.sample(n, generator=rng("language", "law")))
    assert verify.match(samples, tree.logps, claim="lm", versus=[wrong]).decision == "PASS"
    assert verify.match(samples, wrong, claim="lm", versus=[tree.logps]).decision == "REJECT"


def test_all_samplers_take_it():
    m = model(length=3, top_k=3)
    tree = m.tree()
    r = torch.randn(27, generator=rng("language", "r"), dtype=F64)

    def value(state):  # the exact soft value, looked up by what is written
        t = state.tokens.shape[-1]
        at = torch.zeros(len(state.tokens), dtype=torch.int64)
        for ids, token in zip(tree.ids[:t], state.tokens.unbind(-1), strict=True):
            at = at * 3 + (ids[at] == token[:, None]).byte().argmax(-1)
        ahead = (tree.logps + r / 0.5).view(3**t, -1).logsumexp(-1)
        return (ahead - tree.logps.view(3**t, -1).logsumexp(-1))[at]

    gain = smc.by_value(value, m)
    # Log Z-hat of 64 particles is unbiased for Z; kept by weight, one of many particles follows the tilt nearly.
    out = smc.twisted_smc(m, gain, 3, 64, generator=rng("language", "smc"), runs=100)
    z = categorical.log_partition(tree.logps, r, 0.5).exp()
    ratio = (out.log_partition - z.log()).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / 10
    kept = selection.soft_best_of_n_blocks(m, gain, 3, 6, generator=rng("language", "blocks"), strings=3000)
    law = stepwise.soft_best_of_n_chain(
        tree.chain, tree.rewards(r), 0.5, tree.chain.soft_values(tree.rewards(r), 0.5, 3), 6
    ).logps(tree.ranks(torch.arange(27)))
    assert verify.match(tree.find(kept.tokens), law, claim="blocks", versus=[tree.logps]).decision == "PASS"
    start = m.sample(2000, generator=rng("language", "start"))
    moved = mcmc.power_mh(m, start, 2.0, 20, generator=rng("language", "mh")).tokens
    power = torch.log_softmax(2 * tree.logps, -1)
    assert verify.match(tree.find(moved), power, claim="mh", versus=[tree.logps]).decision == "PASS"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_network(kind):
    net = copy.deepcopy(NETWORKS[kind])
    m = LanguageModel(net, PROMPT, L, chunk=8)
    tokens = torch.randint(V, (5, L), generator=rng("language", "gradient"))
    m.logps(tokens).sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    read = torch.cat([PROMPT.expand(5, -1), tokens], 1)
    rows = torch.log_softmax(net(input_ids=read, use_cache=False).logits, -1)[:, 2:-1]
    rows.gather(-1, tokens[..., None]).sum().backward()
    for name, p in net.named_parameters():  # also what the prompt does to its own keys and values
        torch.testing.assert_close(found[name], p.grad, rtol=0, atol=30 * DIGITS[kind], msg=name)


def test_it_follows_the_network_that_is_being_trained():
    net = copy.deepcopy(NETWORKS["llama"])
    m = LanguageModel(net, PROMPT, 2)
    before = m.next_logps(m.begin(1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    after = m.next_logps(m.begin(1))
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, LanguageModel(net, PROMPT, 2).next_logps(m.begin(1)), rtol=0, atol=0)


class Flat:
    """Logits that do not depend on anything, and a cache of nothing. It notes what it is asked for."""

    def __init__(self, *logits):
        self.logits, self.asked = torch.tensor(logits), []

    def __call__(self, input_ids, cache, use_cache):
        assert use_cache is True
        self.asked.append(tuple(input_ids.shape))
        nothing = types.SimpleNamespace(batch_select_indices=lambda index: None)
        return types.SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), cache=nothing)


def test_ties_at_the_edge_go_to_lower_numbers():
    m = LanguageModel(Flat(0.0, 1.0, 0.0, 1.0, *[0.0] * 16), torch.tensor([0]), 2, top_k=3)
    row = m.next_logps(m.begin(2))[1]
    e = math.exp(1)
    expected = torch.tensor([1 / (1 + 2 * e), e / (1 + 2 * e), 0, e / (1 + 2 * e), *[0] * 16], dtype=F64).log()
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-14)
    check_model(m, 2, generator=rng("language", "ties"), draws=1000)


def test_what_is_excluded_is_not_drawn_at_the_edges_of_the_cdf():
    m = LanguageModel(Flat(-math.inf, 0.0, 0.0, -math.inf, 0.0, 0.0), torch.tensor([0]), 2)
    numbers = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=F64)
    m._uniforms = lambda n, length, generator: numbers[None]
    assert m.draw(m.begin(4), generator=rng("language", "x")).tolist() == [1, 2, 4, 5]


def test_all_tokens_are_as_good_as_no_limit():
    every, some = model(top_k=V), model()
    assert torch.equal(every.next_logps(every.begin(1)), some.next_logps(some.begin(1)))


@pytest.mark.parametrize("chunk", [1, 2, 7, 8])
def test_no_more_rows_of_logits_at_a_time_than_chunk(chunk):
    net = Flat(0.0, 1.0, 0.5)
    m = LanguageModel(net, torch.tensor([0]), 3, chunk=chunk)
    m.sample(20, generator=rng("language", "x"))
    assert max(n for n, _ in net.asked) == chunk
    net.asked.clear()
    m.logps(torch.zeros(20, 3, dtype=torch.int64))  # the rows of a string are taken at once
    assert max(n for n, _ in net.asked) == max(1, chunk // 3)
    net.asked.clear()
    m.tree()  # so are those that may follow a beginning
    assert max(n for n, _ in net.asked) == 3 * max(1, min(3, chunk // 3))


def test_an_end_is_the_end():
    """`end` does what `Stopped` does to any model."""
    ours, theirs = model(end=3), Stopped(model(), 3)
    tokens = torch.randint(V, (60, L), generator=rng("language", "ends"))
    tokens[::2, 1:] = 3
    torch.testing.assert_close(ours.logps(tokens), theirs.logps(tokens), rtol=0, atol=DIGITS["llama"])
    drawn = ours.sample(200, generator=rng("language", "end"))
    assert torch.equal(drawn, theirs.sample(200, L, generator=rng("language", "end")))
    after = (drawn == 3).cumsum(-1).cummax(-1).values > 0
    assert bool(after[:, :-1].any()) and bool((drawn[after] == 3).all())


def test_a_state_is_used_once():
    m, one = model(), torch.tensor([0])
    for go_on in (m.append, m.take):
        state = m.begin(1)
        go_on(state, one)
        for again in (m.next_logps, lambda s: m.draw(s, generator=rng("language", "x")), lambda s: m.take(s, one)):
            with pytest.raises(ValueError, match="state was continued already: its keys and values have moved"):
                again(state)
        with pytest.raises(ValueError, match="state was continued already: its keys and values have moved"):
            m.append(state, one)


class Pieces:
    """A tokenizer whose tokens are characters, and what may go wrong with one."""

    def __init__(self, before="", lower=False, wrapped=False):
        self.before, self.lower, self.wrapped = before, lower, wrapped

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        numbers = [ord(c) for c in self.before + (text.lower() if self.lower else text)]
        return types.SimpleNamespace(ids=numbers) if self.wrapped else numbers  # as the package tokenizers does

    def decode(self, numbers, skip_special_tokens):
        assert skip_special_tokens is False
        return "".join(map(chr, numbers))


def test_a_prompt_is_what_its_tokens_stand_for():
    for wrapped in (False, True):
        assert torch.equal(language.encode(Pieces(wrapped=wrapped), "ab"), torch.tensor([97, 98]))
    with pytest.raises(
        ValueError, match=r"text must be what its tokens stand for, got '<s>ab' from the tokens of 'ab'"
    ):
        language.encode(Pieces("<s>"), "ab")
    with pytest.raises(ValueError, match=r"got 'ab' from the tokens of 'aB'"):
        language.encode(Pieces(lower=True), "aB")
    with pytest.raises(ValueError, match=r"text must hold at least one character, got ''"):
        language.encode(Pieces(), "")
    with pytest.raises(TypeError, match="text must be"):
        language.encode(Pieces(), 7)


def test_bad_models_are_refused():
    net = NETWORKS["llama"]
    with pytest.raises(ValueError, match=r"logits must be float32 or float64, got torch.bfloat16.*model.float\(\)"):
        LanguageModel(copy.deepcopy(net).bfloat16(), PROMPT, L)
    with pytest.raises(ValueError, match=r"model must be in evaluation mode, got training mode: call model.eval\(\)"):
        LanguageModel(copy.deepcopy(net).train(), PROMPT, L)
    for bad in (torch.nn.Linear(2, 2).eval(), lambda input_ids: None, 3):
        with pytest.raises(TypeError, match=r"model must take input_ids, cache \(or past_key_values\) and use_cache"):
            LanguageModel(bad, PROMPT, L)

    def answer(logits, cache="default"):
        cache = types.SimpleNamespace(batch_select_indices=lambda index: None) if cache == "default" else cache
        return lambda input_ids, cache_=None, use_cache=True, past_key_values=None: types.SimpleNamespace(
            logits=logits, past_key_values=cache
        )

    with pytest.raises(TypeError, match="with batch_select_indices, got .*Tensor.* and .*tuple"):
        LanguageModel(answer(torch.zeros(1, 3, V), ()), PROMPT, L)
    with pytest.raises(TypeError, match="and return logits"):
        LanguageModel(answer(None), PROMPT, L)
    for nothing in (3, types.SimpleNamespace(logits=torch.zeros(1, 3, V))):
        with pytest.raises(TypeError, match="and return logits"):
            LanguageModel(lambda nothing=nothing, **_: nothing, PROMPT, L)
    with pytest.raises(ValueError, match=r"logits must have shape \(1, 3, 'V'\), got \(1, 1, 9\)"):
        LanguageModel(answer(torch.zeros(1, 1, V)), PROMPT, L)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"logits must be finite or -inf, got NaN or \+inf"):
            LanguageModel(answer(torch.full((1, 3, V), bad)), PROMPT, L)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompt": torch.tensor([], dtype=torch.int64)}, ValueError, "prompt must hold at least one number"),
        ({"prompt": PROMPT[None]}, ValueError, r"prompt must have shape \(S,\).*got \(1, 3\)"),
        ({"prompt": PROMPT.double()}, TypeError, "prompt must be an integer"),
        ({"length": 0}, ValueError, "length must be an integer >= 1, got 0"),
        ({"length": 2.0}, TypeError, "length must be an int"),
        ({"end": V}, ValueError, r"end must lie in 0..8, got 9"),
        ({"top_k": 0}, ValueError, "top_k must be an integer >= 1, got 0"),
        ({"top_k": V + 1}, ValueError, "top_k must be at most 9, the size of the vocabulary, got 10"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"chunk": 0}, ValueError, "chunk must be an integer >= 1, got 0"),
    ],
)
def test_bad_options_are_refused(change, error, match):
    arguments = {"prompt": PROMPT, "length": L} | change
    prompt, length = arguments.pop("prompt"), arguments.pop("length")
    with pytest.raises(error, match=match):
        LanguageModel(NETWORKS["llama"], prompt, length, **arguments)


def test_bad_calls_are_refused():
    m = model(length=2, top_k=4)
    with pytest.raises(ValueError, match=r"tokens must lie in 0..8, got values from 0 to 9"):
        m.logps(torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"tokens must have shape \(n, t\), t in 1..2, got \(1, 3\)"):
        m.logps(torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"tokens must have shape \(n, t\), t in 1..2, got \(2,\)"):
        m.logps(torch.tensor([0, 1]))
    none = m.logps(torch.zeros(0, 2, dtype=torch.int64))
    assert none.shape == (0,) and none.dtype == F64
    with pytest.raises(ValueError, match=r"^tokens must lie in 0..8, got values from 9 to 9"):
        m.append(m.begin(1), torch.tensor([9]))
    with pytest.raises(ValueError, match=r"^n must be an integer >= 1, got 0"):
        m.sample(0, generator=rng("language", "x"))
    with pytest.raises(ValueError, match=r"^length must be an integer >= 1, got 0"):
        m.sample(1, 0, generator=rng("language", "x"))
    with pytest.raises(ValueError, match=r"length must be at most 2, that of the model, got 3"):
        m.sample(1, 3, generator=rng("language", "x"))
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got 0"):
        m.begin(0)
    with pytest.raises(ValueError, match=r"tokens must have shape \(3,\), got \(2,\)"):
        m.append(m.begin(3), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"index must have shape \(m,\), got \(1, 1\)"):
        m.take(m.begin(3), torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"index must lie in 0..2, got values from 3 to 3"):
        m.take(m.begin(3), torch.tensor([3]))
    full = m.append(m.append(m.begin(1), torch.tensor([1])), torch.tensor([2]))
    for call in (
        m.next_logps,
        lambda s: m.append(s, torch.tensor([1])),
        lambda s: m.draw(s, generator=rng("language", "x")),
    ):
        with pytest.raises(ValueError, match="state must hold strings of fewer than 2 tokens, got 2"):
            call(full)
    with pytest.raises(ValueError, match=r"top_k must leave at most 2\^26 strings, got \(k \+ 1\)\^L = 10\^8"):
        model(length=8).tree()
    tree = m.tree()
    with pytest.raises(ValueError, match=r"rewards must have shape \(16,\), got \(15,\)"):
        tree.rewards(torch.zeros(15))
    with pytest.raises(ValueError, match=r"tokens must have shape \(n, 2\), got \(1, 3\)"):
        tree.find(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ranks must have shape \(..., 2\), got \(1, 3\)"):
        tree.number(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ranks must have shape \(..., 2\), got \(\)"):
        tree.number(torch.tensor(1))
    with pytest.raises(ValueError, match=r"^index must lie in 0..15"):
        tree.ranks(torch.tensor([16]))
    with pytest.raises(ValueError, match=r"^ranks must lie in 0..3"):
        tree.number(torch.tensor([[0, 4]]))


def test_float32_is_the_same_law_to_its_digits():
    net = copy.deepcopy(NETWORKS["llama"]).float()
    tokens = torch.randint(V, (20, L), generator=rng("language", "float32"))
    found = LanguageModel(net, PROMPT, L).logps(tokens)
    assert found.dtype == F64
    torch.testing.assert_close(found, model().logps(tokens), rtol=0, atol=1e-4)


# --- a pool on disk ---


def pool(path, n=20, chunk=8, seed="pool", kinds=("llama", "gpt2"), **options):
    models = [model(kind, chunk=chunk, end=8) for kind in kinds]
    return language.generate(models, n, path, generator=rng("language", seed), **options)


def test_a_pool_that_broke_off_goes_on(tmp_path):
    whole = pool(tmp_path / "whole.jsonl")
    text = (tmp_path / "whole.jsonl").read_bytes()
    assert whole.tokens.shape == (2, 20, L) and whole.logps.shape == (2, 20)
    g = rng("language", "pool")  # it is what sample draws, one prompt after the other
    assert torch.equal(whole.tokens[0], model("llama", end=8).sample(20, generator=g))
    assert torch.equal(whole.tokens[1], model("gpt2", end=8).sample(20, generator=g))
    assert bool((whole.tokens[1, :, :-1] == 8).any())  # some ended early
    expected = model("gpt2", end=8).logps(whole.tokens[1])
    torch.testing.assert_close(whole.logps[1], expected, rtol=0, atol=DIGITS["gpt2"])
    lines = text.split(b"\n")
    for kept in (0, 1, 5, 8, 12, 16, 20, 21, 39, 40):
        for cut in (b"", lines[kept][:9]):
            path = tmp_path / "part.jsonl"
            path.write_bytes(b"".join(line + b"\n" for line in lines[:kept]) + cut)
            again = pool(path)
            assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.logps, whole.logps)
            assert path.read_bytes() == text
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == [0] * 20 + [1] * 20
    alone = pool(tmp_path / "alone.jsonl", kinds=("llama",))
    assert torch.equal(alone.tokens, whole.tokens[:1]) and torch.equal(alone.logps, whole.logps[:1])


def test_a_pool_keeps_what_was_drawn_before_an_error(tmp_path):
    path, count = tmp_path / "p.jsonl", 0

    def decode(numbers):
        nonlocal count
        count += 1
        if count == 14:
            raise RuntimeError("the machine stops")
        return "\u2028".join(map(str, numbers))  # a character that some take for the end of a line

    with pytest.raises(RuntimeError):
        pool(path, decode=decode)
    assert path.read_bytes().count(b"\n") == 13 and "\u2028".encode() in path.read_bytes()
    again = pool(path, decode=decode)
    assert torch.equal(again.tokens, pool(tmp_path / "other.jsonl").tokens)
    assert json.loads(path.read_text("utf-8").split("\n")[0])["text"].count("\u2028") == L - 1


def test_a_pool_of_something_else_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    pool(path, n=3, chunk=8)
    before = path.read_bytes()
    for bad in ({"seed": "another"}, {"kinds": ("gpt2", "gpt2")}):
        with pytest.raises(ValueError, match=r"path must hold what this call draws, got other tokens in line \d"):
            pool(path, n=3, **bad)
    stored = json.loads(before.splitlines()[3])["logp"]
    with pytest.raises(
        ValueError, match=rf"path must hold what this call draws, got log-probability {stored:g} for \S+ in line 4"
    ):
        pool(path, n=3, kinds=("llama", "llama"))
    with pytest.raises(ValueError, match=r"path must hold at most 4 lines, got 6.* another n; for more"):
        pool(path, n=2)
    with pytest.raises(
        ValueError, match=r"path must hold 4 tokens and logp of prompt 0 in line 4.* another n; for more"
    ):
        pool(path, n=5)
    assert path.read_bytes() == before
    for line in (
        "no json",
        "[]",
        '{"prompt": 0, "tokens": [1, 2], "logp": 0}',
        '{"prompt": 0, "tokens": [1, 2, 3, 4]}',
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"path must hold 4 tokens and logp of prompt 0 in line 1, got"):
            pool(path)
        assert path.read_text() == line + "\n"


def test_a_pool_with_another_string_or_log_probability_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    whole = pool(path, n=3)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def changed(number, **fields):
        rows = [line | fields if i == number else line for i, line in enumerate(lines, 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    changed(3, tokens=[(token + 1) % V for token in lines[2]["tokens"]])
    with pytest.raises(ValueError, match=r"got other tokens in line 3 of"):
        pool(path, n=3)
    changed(4, logp=lines[3]["logp"] + 0.0009 * L)  # float32 moves it by less
    assert torch.equal(pool(path, n=3).tokens, whole.tokens)
    changed(4, logp=lines[3]["logp"] + 0.0011 * L)
    with pytest.raises(ValueError, match=r"got log-probability \S+ for \S+ in line 4 of"):
        pool(path, n=3)


def test_bad_arguments_of_a_pool_are_refused(tmp_path):
    g = rng("language", "x")
    with pytest.raises(ValueError, match=r"models must be one or more of one length, got lengths \[\]"):
        language.generate([], 2, tmp_path / "p", generator=g)
    with pytest.raises(ValueError, match=r"got lengths \[2, 4\]"):
        language.generate([model(), model(length=2)], 2, tmp_path / "p", generator=g)
    with pytest.raises(TypeError, match=r"models\[1\] must be"):
        language.generate([model(), 3], 2, tmp_path / "p", generator=g)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        language.generate([model()], 0, tmp_path / "p", generator=g)
    with pytest.raises(TypeError, match="generator must be"):
        language.generate([model()], 2, tmp_path / "p", generator=None)
