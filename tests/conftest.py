"""Shared by all tests: no network, a cache of the session's own, quiet threads, and tiny models built from configurations."""

from __future__ import annotations

import os

# Before transformers is imported: without network its first look-up retries for most of a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is: threads that wait actively starve each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest

V, D, L = 64, 16, 3  # vocabulary, width and layers of the tiny models

HEADS = {"num_attention_heads": 2, "intermediate_size": 32}
SHARED_HEADS = {**HEADS, "num_key_value_heads": 1}
WIDE_HEADS = {**SHARED_HEADS, "head_dim": 8}

# model type: name of the classes, options. Between them they call their blocks in every way there is: by position or by
# name, one output or a tuple, shared key heads, experts, attention and feed-forward in parallel, norms after the blocks,
# sliding windows, a feed-forward block that is no module.
FAMILIES = {
    "llama": ("Llama", HEADS),
    "mistral": ("Mistral", {**WIDE_HEADS, "sliding_window": 8}),
    "mixtral": ("Mixtral", {**SHARED_HEADS, "num_local_experts": 2}),
    "gemma": ("Gemma", WIDE_HEADS),
    "gemma2": ("Gemma2", WIDE_HEADS),
    "gemma3": ("Gemma3", {**WIDE_HEADS, "sliding_window": 8}),
    "qwen2": ("Qwen2", SHARED_HEADS),
    "qwen3": ("Qwen3", WIDE_HEADS),
    "phi3": ("Phi3", SHARED_HEADS),
    "olmo2": ("Olmo2", SHARED_HEADS),
    "gpt2": ("GPT2", {"n_head": 2, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", HEADS),
    "opt": (
        "OPT",
        {
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 128,
            "init_std": 0.3,
        },
    ),
    "falcon": ("Falcon", {"num_attention_heads": 2}),
    "stablelm": ("StableLm", SHARED_HEADS),
    "smollm3": ("SmolLM3", SHARED_HEADS),
}
_TEXT_ONLY = {"gemma3": "Gemma3TextConfig"}
_OTHER_ENDING = {"gpt2": "GPT2LMHeadModel"}


def build_tiny_model(family: str = "llama", n_layers: int = L, seed: int = 0, **changes):
    """A causal language model of a few thousand random weights, large enough to make every logit different."""
    import torch
    import transformers

    name, settings = FAMILIES[family]
    config_class = getattr(transformers, _TEXT_ONLY.get(family, f"{name}Config"))
    model_class = getattr(transformers, _OTHER_ENDING.get(family, f"{name}ForCausalLM"))
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": n_layers, "initializer_range": 0.3}
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = config_class(**sizes, **tokens, **settings, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def build_tiny_image_reader(seed: int = 0):
    """A Gemma 3 as its sizes from 4B on are: a text decoder of L layers beside a tower of more layers that reads images."""
    import torch
    import transformers

    text = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": L,
        "initializer_range": 0.3,
        **FAMILIES["gemma3"][1],
    }
    image = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": L + 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0},
        vision_config={**image, "image_size": 28, "patch_size": 14},
        **{"mm_tokens_per_image": 4, "image_token_id": 60, "boi_token_index": 61, "eoi_token_index": 62},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(family='llama', n_layers=3, seed=0)`: a new model, the same weights for the same arguments."""
    return build_tiny_model


def add_bos(tokenizer):
    """A copy that puts a token of its own before every text, as Gemma's and Llama's do."""
    import copy

    from tokenizers.processors import TemplateProcessing

    begun = copy.deepcopy(tokenizer)
    begun.add_special_tokens({"bos_token": "<bos>"})
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begun.bos_token_id)]
    )
    return begun


@pytest.fixture(scope="session")
def with_bos():
    """`with_bos(tokenizer)`: a copy that puts a new token, the last of its vocabulary, before every text."""
    return add_bos


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory):
    """Caches, records and counts of this session; the checkout's own are neither read nor written."""
    folder = tmp_path_factory.mktemp("nrlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRLIB_CACHE", str(folder / "cache"))
        patch.setenv("NRLIB_RESULTS", str(folder / "results"))
        patch.setenv("NRLIB_COUNTS", str(folder / "runs.jsonl"))
        patch.delenv("NRLIB_PUBLISH", raising=False)
        yield folder


@pytest.fixture(scope="module")
def published_results(scratch):
    """Results and records are the checkout's own, for tests of what a page says of them."""
    from nrlib.storage import project_directory

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRLIB_RESULTS", str(project_directory() / "data" / "results"))
        yield


# A run of a fifth of a second, on the smoke profile.
SMALL = {
    "original": "synthetic:aurelian?n_documents=300",
    "proxy": "synthetic:aurelian/plain?n_documents=150",
    "unseen_original": "synthetic:aurelian/manual?n_documents=150",
    "new_domain": "synthetic:borealic?n_documents=200",
    "n_evaluation_bytes": 2_000,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "ffn_width": 32,
    "vocabulary_size": 300,
    "pretraining_tokens": 4_096,
    "n_tokens": 20 * 4 * 32,
    "context_length": 32,
    "batch_size": 4,
    "precision": "float32",
}


@pytest.fixture(scope="session")
def small_config():
    """`small_config(**changes)`: a run so small that it can be trained within a test."""
    from nrlib.config import make_config

    return lambda **changes: make_config("smoke", **{**SMALL, **changes})


@pytest.fixture(scope="session")
def built_book(tmp_path_factory):
    """Folder of the finished book: `$NRLIB_BOOK`, else built once a session from notebooks on the smallest profile."""
    from pathlib import Path

    from nrlib import book
    from nrlib.storage import project_directory

    if named := os.environ.get("NRLIB_BOOK"):
        folder = Path(named).resolve()
        assert (folder / "index.html").exists(), f"NRLIB_BOOK: there is no book in {folder}. Run: make book"
        return folder
    folder = tmp_path_factory.mktemp("book")
    changes = {"seeds": [0], "learning_rates": [0.01]}
    executed = book.execute_notebooks("smoke", folder / "notebooks", changes, progress=False)
    with pytest.MonkeyPatch.context() as patch:  # the explorer and the guide show the published records
        patch.setenv("NRLIB_RESULTS", str(project_directory() / "data" / "results"))
        return book.build_book(executed, folder / "book").parent
